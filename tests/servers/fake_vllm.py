"""A server that says of given tokens what a tiny model says, in the shape of vLLM: /tokenize and prompt_logprobs."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Scoring:
    """Where it answers, and what it was asked."""

    url: str
    asked: list[dict[str, Any]] = field(default_factory=list)
    keys: set[str | None] = field(default_factory=set)
    teams: set[str | None] = field(default_factory=set)  # of the header X-Team
    queries: set[str] = field(default_factory=set)


@contextmanager
def scoring(folder: str, *, most: int = 20) -> Iterator[Scoring]:
    """Serves the model in the folder until the block ends; refuses more than `most` logprobs, as vLLM does."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    server = Scoring("")

    def about(ids: list[int], top: int) -> list[dict[str, Any] | None]:
        with torch.no_grad():
            scores = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        said: list[dict[str, Any] | None] = [None]
        for row, chosen in zip(scores[:-1], ids[1:], strict=True):
            order = row.argsort(descending=True).tolist()
            listed = [*order[:top], *([chosen] if chosen not in order[:top] else [])]
            said.append({str(id_): {"logprob": row[id_].item(), "rank": order.index(id_) + 1} for id_ in listed})
        return said

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            server.asked.append(request)
            server.keys.add(self.headers.get("Authorization"))
            server.teams.add(self.headers.get("X-Team"))
            path, _, query = self.path.partition("?")
            server.queries.add(query)
            status, body = 200, {}
            if path == "/tokenize":
                body = {"tokens": tokenizer(request["prompt"], add_special_tokens=False)["input_ids"]}
            elif request["prompt_logprobs"] > most:
                status, body = 400, {"error": {"message": f"requested more than {most} logprobs"}}
            else:
                top = request["prompt_logprobs"]
                body = {"choices": [{"prompt_logprobs": about(ids, top)} for ids in request["prompt"]]}
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args: object) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.url = f"http://127.0.0.1:{http.server_port}/v1"
    threading.Thread(target=http.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
