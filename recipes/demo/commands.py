"""Commands for a smart home, each with what it means: `rows()` is what the demo's `prompts.file` draws from."""

from collections.abc import Iterator
from random import Random

ROOMS = ["kitchen", "bedroom", "bathroom", "living room", "dining room", "office", "hallway", "garage", "nursery"]
ROOMS += ["attic", "basement", "guest room"]
DEVICES = {  # by what can be asked of them
    "on": ["lamp", "fan", "heater", "radio", "TV", "speaker"],
    "off": ["lamp", "fan", "heater", "radio", "TV", "speaker"],
    "open": ["window", "door", "curtain", "gate"],
    "closed": ["window", "door", "curtain", "gate"],
    "level": ["lamp", "fan", "heater", "radio", "speaker"],
}
LEVELS = ["low", "medium", "high"]  # words: a student of four layers does not learn to copy any number from so few rows
PHRASINGS = {
    "on": [
        "Turn on the {device} in the {room}.",
        "Turn the {room} {device} on.",
        "Please switch on the {room} {device}.",
        "I need the {device} on in the {room}.",
        "Could you put the {device} in the {room} on?",
        "{room}: {device} on",
    ],
    "off": [
        "Turn off the {device} in the {room}.",
        "Turn the {room} {device} off.",
        "Please switch off the {room} {device}.",
        "I want the {device} off in the {room}.",
        "Could you stop the {device} in the {room}?",
        "{room}: {device} off",
    ],
    "open": [
        "Open the {device} in the {room}.",
        "Open the {room} {device}.",
        "Please have the {device} in the {room} open.",
        "I want the {room} {device} open.",
        "Could you open the {device} in the {room}?",
        "{room}: {device} open",
    ],
    "closed": [
        "Close the {device} in the {room}.",
        "Close the {room} {device}.",
        "Please keep the {device} in the {room} closed.",
        "I want the {room} {device} closed.",
        "Could you shut the {device} in the {room}?",
        "{room}: {device} closed",
    ],
    "level": [
        "Set the {device} in the {room} to {level}.",
        "Set the {room} {device} to {level}.",
        "Please put the {device} in the {room} at {level}.",
        "I want the {room} {device} at {level}.",
        "Could you change the {device} in the {room} to {level}?",
        "{room}: {device} {level}",
    ],
}


def rows() -> Iterator[dict[str, object]]:
    """2,000 different commands in a random order; each kind is as likely as another."""
    rng, asked = Random(0), set()
    while len(asked) < 2000:
        kind = rng.choice(list(PHRASINGS))
        level = rng.choice(LEVELS)
        room, device = rng.choice(ROOMS), rng.choice(DEVICES[kind])
        prompt = rng.choice(PHRASINGS[kind]).format(room=room, device=device, level=level)
        if prompt not in asked:
            asked.add(prompt)
            state = level if kind == "level" else kind
            yield {"prompt": prompt, "reference": {"room": room, "device": device, "state": state}, "kind": kind}
