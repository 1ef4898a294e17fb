"""Made e-mails to a shop, and the order in each: nested items, a list, optional fields, an enum.

Nothing is downloaded: names, things and sentences are put together at random, so any number of rows can be had. What an
order says of delivery and colour is sometimes missing, and sentences that order nothing stand in between.
"""

from __future__ import annotations

import enum

import numpy as np
from pydantic import BaseModel, Field

from copa_harness.tasks.extraction import extraction
from copa_harness.tasks.task import Task


class Delivery(str, enum.Enum):
    """How an order is sent."""

    STANDARD = "standard"
    EXPRESS = "express"
    PICKUP = "pickup"


class Item(BaseModel):
    """One line of an order."""

    product: str
    quantity: int
    colour: str | None = None


class Order(BaseModel):
    """What a customer orders."""

    customer: str = Field(description="full name of who orders")
    city: str | None = Field(default=None, description="where the order goes")
    delivery: Delivery
    items: list[Item]


NAMES = ("Ada Moore", "Ben Okafor", "Carla Diaz", "Deniz Aydin", "Emma Lund", "Farid Khan", "Grace Lee", "Hugo Blanc")
CITIES = ("Lisbon", "Oslo", "Graz", "Leeds", "Porto", "Ghent", "Turin", "Malmo")
PRODUCTS = ("lamp", "chair", "mug", "pillow", "notebook", "kettle", "basket", "clock")
COLOURS = ("red", "blue", "green", "black", "white")
NUMBERS = ("one", "two", "three", "four", "five", "six")
OPENINGS = ("Hello,", "Dear shop,", "Hi there,", "Good morning,")
ASKING = ("I would like to order", "please send me", "we need", "I want to buy")
ASIDES = ("Your new catalogue is lovely.", "My neighbour recommended you.", "The old ones broke last week.", "")
DELIVERIES = {
    Delivery.STANDARD: ("No hurry.", "Normal delivery is fine.", ""),
    Delivery.EXPRESS: ("It is urgent, please send it by express.", "I need it by tomorrow."),
    Delivery.PICKUP: ("I will collect it at your shop.", "I will come and pick it up."),
}


def order_emails(seed: int = 0, *, n_train: int = 40, n_val: int = 24, n_test: int = 60, whole: bool = False) -> Task:
    """The order in an e-mail, as an `Order`; one predictor.

    Args:
        seed: Makes the e-mails and chooses the split.
        n_train: Training rows.
        n_val: Validation rows.
        n_test: Test rows.
        whole: Whether only orders that are right in every field score.
    """
    made: dict[str, Order] = {}
    rng = np.random.default_rng(seed)
    while len(made) < n_train + n_val + n_test:
        text, order = _email(rng)
        made[text] = order
    return extraction(
        Order,
        list(made.items()),
        name="order_emails",
        instructions="Extract the order from the e-mail.",
        whole=whole,
        seed=seed,
        sizes=(n_train, n_val, n_test),
    )


def _email(rng: np.random.Generator) -> tuple[str, Order]:
    def one(options: tuple[str, ...]) -> str:
        return options[int(rng.integers(len(options)))]

    delivery = list(Delivery)[int(rng.integers(3))]
    city = one(CITIES) if delivery is not Delivery.PICKUP else None
    items, phrases = [], []
    for product in rng.choice(PRODUCTS, size=int(rng.integers(1, 4)), replace=False).tolist():
        quantity = int(rng.integers(1, 7))
        colour = one(COLOURS) if rng.random() < 0.6 else None
        number = NUMBERS[quantity - 1] if rng.random() < 0.5 else str(quantity)
        items.append(Item(product=product, quantity=quantity, colour=colour))
        phrases.append(" ".join(filter(None, (number, colour, product if quantity == 1 else f"{product}s"))))
    customer = one(NAMES)
    listed = " and ".join(filter(None, (", ".join(phrases[:-1]), phrases[-1])))
    place = f" It goes to {city}." if city else ""
    parts = (
        one(OPENINGS),
        f"{one(ASKING)} {listed}.{place}",
        one(ASIDES),
        one(DELIVERIES[delivery]),
        f"Regards, {customer}",
    )
    return " ".join(filter(None, parts)), Order(customer=customer, city=city, delivery=delivery, items=items)
