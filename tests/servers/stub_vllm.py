"""A stand-in for vLLM's server, run as `python -m vllm.entrypoints.openai.api_server`: starts at once, does as told.

It answers every chat request with the same words.

STUB_VLLM says how it behaves: ok, die (an engine that fails, with vLLM's own way of saying so), killed, silent, other
(serves another name), late (dies once it has been asked for its models). Whatever it does, it first starts a child,
its engine, which STUB_STUCK has ignore SIGTERM.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

IGNORE = "signal.signal(signal.SIGTERM, signal.SIG_IGN)" if os.environ.get("STUB_STUCK") else "pass"
ENGINE = f"import signal, time; {IGNORE}; x = bytearray(64 << 20); time.sleep(600)"
DIED = """\
(EngineCore pid=7) ERROR 11-23 23:50:05 [core.py:402] Traceback (most recent call last):
(EngineCore pid=7) ERROR 11-23 23:50:05 [core.py:402]   File "core.py", line 1, in run
(EngineCore pid=7) ERROR 11-23 23:50:05 [core.py:402] ValueError: the weights are for another model
(APIServer pid=5) Traceback (most recent call last):
(APIServer pid=5)   File "api_server.py", line 9, in <module>
(APIServer pid=5) RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}
"""

mode = os.environ["STUB_VLLM"]
parser = argparse.ArgumentParser()
parser.add_argument("--host")
parser.add_argument("--port", type=int)
parser.add_argument("--served-model-name")
options, _ = parser.parse_known_args()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        name = "another" if mode == "other" else options.served_model_name
        body = json.dumps({"data": [{"id": name}]}).encode() if self.path == "/v1/models" else b""
        self.reply(body)
        if mode == "late" and body:
            threading.Timer(1, lambda: (print(DIED, flush=True), os._exit(1))).start()

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        time.sleep(0.05)
        message = {"role": "assistant", "content": "hello"}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        usage = {"prompt_tokens": 3, "completion_tokens": 1, "total_tokens": 4}
        answer = {"id": "x", "object": "chat.completion", "created": 0, "model": "stub", "choices": [choice]}
        self.reply(json.dumps({**answer, "usage": usage}).encode())

    def reply(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


engine = subprocess.Popen([sys.executable, "-c", ENGINE, "VLLM::EngineCore"])
print("INFO 11-23 23:50:05 [stub.py:1] stub engine started", flush=True)
if mode == "die":
    print(DIED, flush=True)
    sys.exit(1)
elif mode == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
elif mode == "silent":
    time.sleep(600)
else:
    ThreadingHTTPServer((options.host, options.port), Handler).serve_forever()
