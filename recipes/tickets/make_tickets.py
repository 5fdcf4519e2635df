"""Write tickets.csv, 600 made-up support tickets with their labels, again: `python recipes/tickets/make_tickets.py`."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from random import Random

PRODUCTS = ["router", "tablet", "headset", "camera", "printer", "smart watch"]
PROBLEMS = {  # what a customer writes, by category and priority
    ("technical", "high"): [
        "My {product} is completely dead since this morning and I cannot work.",
        "The {product} gets so hot that it smells of smoke. I have unplugged it.",
        "Nothing works any more after the update: the {product} does not even start.",
        "All our office is down because the {product} keeps crashing.",
    ],
    ("technical", "normal"): [
        "The {product} loses its connection about once a day.",
        "The battery of the {product} only lasts two hours, it used to be eight.",
        "Since the last update the {product} is rather slow.",
        "One button of my {product} reacts only at the second press.",
    ],
    ("technical", "low"): [
        "How do I change the language of the {product}?",
        "Is there a dark mode for the {product}? It would be nice to have.",
        "Where do I find the manual of the {product} online?",
        "Just curious: can the {product} be used with a longer cable?",
    ],
    ("billing", "high"): [
        "You have charged my card three times for one {product}! I need that money back today.",
        "Somebody bought a {product} with my card. It was not me, please stop the payment at once.",
        "My account was emptied by a wrong invoice for the {product}. This is urgent.",
        "I was billed 4,000 instead of 400 for the {product} and my rent bounced.",
    ],
    ("billing", "normal"): [
        "The invoice for my {product} shows the wrong address. Please send a new one.",
        "I was promised a discount on the {product}, but the bill has the full price.",
        "I paid for the {product} last week and still have no receipt.",
        "The tax on the invoice of my {product} seems to be wrong.",
    ],
    ("billing", "low"): [
        "Can I pay for the {product} in instalments next time?",
        "Which cards do you take? I may buy a {product} in spring.",
        "Could future invoices for the {product} come as PDF? No hurry.",
        "Do you give a student discount on the {product}?",
    ],
    ("delivery", "high"): [
        "The {product} was for a surgery tomorrow and it has still not arrived. Please help now.",
        "The courier left the {product} in the rain, and now the box is soaked and everything is wet.",
        "My {product} was delivered to a stranger who refuses to give it back.",
        "I need the {product} today, I leave the country in the morning and the parcel is lost.",
    ],
    ("delivery", "normal"): [
        "My {product} was to arrive on Monday, it is Thursday now.",
        "The tracking of my {product} has not changed for four days.",
        "I got a parcel, but the {product} in it has the wrong colour.",
        "Please send the {product} to my new address, I have moved.",
    ],
    ("delivery", "low"): [
        "Do you also ship the {product} to Norway?",
        "Could the {product} be gift wrapped? It is for a birthday in some months.",
        "How long does the delivery of a {product} take in general?",
        "It would be nice if the {product} came in less plastic.",
    ],
    ("returns", "high"): [
        "You refused my return of the broken {product} and the deadline ends today!",
        "I sent the {product} back two months ago, and neither money nor answer has come. I will go to a lawyer.",
        "The {product} you sent as a replacement gave me an electric shock. Take it back at once.",
        "My refund for the {product} went to someone else's account. Please act now.",
    ],
    ("returns", "normal"): [
        "I would like to return the {product}, it does not suit me.",
        "Please send me a label so that I can send the {product} back.",
        "The {product} I returned last week does not show in my account yet.",
        "I want to exchange the {product} for a larger one.",
    ],
    ("returns", "low"): [
        "How many days do I have to return a {product}? I have not bought it yet.",
        "Can I return a {product} in a shop too?",
        "Do I need the box to send back a {product}? Only asking.",
        "What happens to a {product} that people return? I am curious.",
    ],
}
OPENINGS = ["", "Hello,", "Hi there,", "Dear team,", "Good morning,", "To whom it may concern,", "Hey,", "Hi support,"]
CLOSINGS = [
    "",
    "Thanks.",
    "Thank you!",
    "Best regards, Kim",
    "Please write back.",
    "Greetings from Oslo",
    "Cheers, Sam",
]


def tickets(count: int, rng: Random) -> Iterator[dict[str, str]]:
    """Different tickets, each with its labels and, as JSON, the answer that is wanted."""
    texts = [
        (
            category,
            priority,
            product,
            " ".join(part for part in (opening, problem.format(product=product), closing) if part),
        )
        for (category, priority), problems in PROBLEMS.items()
        for problem in problems
        for product in PRODUCTS
        for opening, closing in zip(rng.sample(OPENINGS, 3), rng.sample(CLOSINGS, 3), strict=True)
    ]
    for number, (category, priority, product, text) in enumerate(rng.sample(texts, count), 1):
        labels = {"category": category, "priority": priority, "product": product}
        yield {"id": f"ticket-{number}", "prompt": text, **labels, "reference": json.dumps(labels)}


if __name__ == "__main__":
    with Path(__file__).with_name("tickets.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(
            file, ["id", "prompt", "category", "priority", "product", "reference"], lineterminator="\n"
        )
        writer.writeheader()
        writer.writerows(tickets(600, Random(0)))
