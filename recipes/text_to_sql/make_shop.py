"""Write shop.sql, the made-up shop of the recipe, again: `python recipes/text_to_sql/make_shop.py`.

Prices are multiples of 0.5, so that sums in SQLite are exact, and no two products cost the same, so that an order by
price has no ties.
"""

import sqlite3
from datetime import date, timedelta
from pathlib import Path
from random import Random

SCHEMA = """
CREATE TABLE customers (
  id INTEGER PRIMARY KEY, name TEXT, email TEXT, city TEXT, country TEXT, signup_date TEXT
);
CREATE TABLE categories (id INTEGER PRIMARY KEY, name TEXT);
CREATE TABLE products (
  id INTEGER PRIMARY KEY, name TEXT, category_id INTEGER REFERENCES categories(id), price REAL, stock INTEGER
);
CREATE TABLE orders (
  id INTEGER PRIMARY KEY, customer_id INTEGER REFERENCES customers(id), order_date TEXT, status TEXT, payment TEXT,
  total REAL
);
CREATE TABLE order_items (
  id INTEGER PRIMARY KEY, order_id INTEGER REFERENCES orders(id), product_id INTEGER REFERENCES products(id),
  quantity INTEGER, unit_price REAL
);
CREATE TABLE reviews (
  id INTEGER PRIMARY KEY, product_id INTEGER REFERENCES products(id), customer_id INTEGER REFERENCES customers(id),
  rating INTEGER, review_date TEXT
);
"""
CITIES = {
    "Germany": "Berlin, Hamburg",
    "France": "Paris, Lyon",
    "Spain": "Madrid, Seville",
    "Italy": "Rome, Turin",
    "Portugal": "Lisbon, Porto",
    "Austria": "Vienna, Graz",
}
FIRST = "Anna, Ben, Clara, David, Elena, Felix, Greta, Hugo, Irene, Jonas, Katja, Leon, Maria, Nils, Olga, Pablo, Rosa"
LAST = "Adler, Bauer, Costa, Duarte, Ferrari, Garcia, Huber, Keller, Lopez, Martin, Moreau, Novak, Pereira, Rossi"
PRODUCTS = {
    "Furniture": "Oak Desk, Pine Table, Office Chair, Bookshelf, Bar Stool, Folding Bed, Coat Rack, Leather Sofa",
    "Lighting": "Desk Lamp, Floor Lamp, Ceiling Light, Night Light, Fairy Lights, Wall Lamp, Reading Light, Lantern",
    "Kitchen": "Bread Knife, Frying Pan, Salad Bowl, Tea Kettle, Coffee Mug, Cutting Board, Spice Rack, Hand Mixer",
    "Garden": "Garden Hose, Flower Pot, Watering Can, Rake, Bird House, Hedge Shears, Sun Umbrella, Garden Bench",
    "Toys": "Wooden Train, Puzzle, Teddy Bear, Toy Car, Board Game, Doll House, Kite, Building Blocks",
    "Books": "Atlas, Cook Book, Crime Novel, Poetry Book, Travel Guide, Dictionary, Comic Book, Art Book",
    "Sports": "Yoga Mat, Tennis Racket, Football, Jump Rope, Dumbbells, Bike Helmet, Swim Goggles, Climbing Rope",
    "Electronics": "Headphones, Keyboard, Webcam, Power Bank, Speaker, Monitor, Phone Case, Smart Watch",
}
STATUSES = ["pending", "shipped", "delivered", "cancelled", "returned"]
PAYMENTS = ["card", "paypal", "transfer", "cash"]
TODAY = date(2024, 12, 31)  # the shop's last day


def make_shop(rng: Random) -> sqlite3.Connection:
    """120 customers, 64 products, 700 orders of 2023 and 2024, in memory."""
    shop = sqlite3.connect(":memory:")
    shop.executescript(SCHEMA)
    names = rng.sample([f"{first} {last}" for first in FIRST.split(", ") for last in LAST.split(", ")], 120)
    signups = [_day(rng, date(2021, 1, 1), date(2024, 6, 30)) for _ in names]
    for number, (name, signup) in enumerate(zip(names, signups, strict=True), 1):
        country, city = rng.choice([(country, city) for country, line in CITIES.items() for city in line.split(", ")])
        email = name.lower().replace(" ", ".") + "@example.com"
        _insert(shop, "customers", number, name, email, city, country, signup.isoformat())

    prices = rng.sample([half / 2 for half in range(10, 400)], 64)
    products = [(kind, name) for kind, line in enumerate(PRODUCTS.values(), 1) for name in line.split(", ")]
    for kind, category in enumerate(PRODUCTS, 1):
        _insert(shop, "categories", kind, category)
    for number, ((kind, name), price) in enumerate(zip(products, prices, strict=True), 1):
        _insert(shop, "products", number, name, kind, price, rng.randrange(0, 200))

    items = 0
    for order in range(1, 701):
        customer = rng.randrange(1, 116)  # the last five have ordered nothing
        day = _day(rng, max(date(2023, 1, 1), signups[customer - 1]), TODAY)
        bought = [(p, rng.choice([1, 1, 1, 2, 2, 3, 5])) for p in rng.sample(range(1, 65), rng.randrange(1, 5))]
        total = sum(quantity * prices[product - 1] for product, quantity in bought)
        status = rng.choices(STATUSES, [2, 3, 8, 1, 1])[0]
        _insert(shop, "orders", order, customer, day.isoformat(), status, rng.choice(PAYMENTS), total)
        for product, quantity in bought:
            items += 1
            _insert(shop, "order_items", items, order, product, quantity, prices[product - 1])
            if rng.random() < 0.3:
                rating = rng.choices([1, 2, 3, 4, 5], [1, 1, 2, 4, 4])[0]
                written = min(TODAY, day + timedelta(days=rng.randrange(3, 40)))
                _insert(shop, "reviews", None, product, customer, rating, written.isoformat())
    return shop


def _day(rng: Random, first: date, last: date) -> date:
    return first + timedelta(days=rng.randrange((last - first).days + 1))


def _insert(shop: sqlite3.Connection, table: str, *values: object) -> None:
    shop.execute(f"INSERT INTO {table} VALUES ({', '.join('?' * len(values))})", values)


if __name__ == "__main__":
    dump = "\n".join(make_shop(Random(0)).iterdump())
    Path(__file__).with_name("shop.sql").write_text(dump + "\n", encoding="utf-8")
