"""Invented people: names, what can be true of them, and the sentences that say so, ask for it and say that it changed.

Everything comes in splits that share no first name, no last name, no value and no sentence: "choose", for whoever looks
for good settings; "test", for what is reported; and "unseen" and "fresh", with other things that are true of people
besides, each for a last word when settings had been tried on the splits before it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Literal, TypeVar

from attrs import define, evolve

from mplus.evaluation.tasks.people import fresh, unseen
from mplus.evaluation.tasks.people.attributes import Attribute, words

Half = Literal["choose", "test"]
Split = Literal["choose", "test", "unseen", "fresh"]
SPLITS: tuple[Split, ...] = ("choose", "test", "unseen", "fresh")
Item = TypeVar("Item")

FIRST = words("""
Maria Tom Ingrid Pedro Aiko Liam Fatima Viktor Chloe Samuel Nadia Henrik Rosa Omar Greta Felix Leila Bruno Hana Oscar
Priya Mateo Zara Ivan Lucia Karim Elsa Hugo Amara Dylan Celia Anton Yuki Rafael Mina Gustav Ines Tariq Olga Benjamin
Freya Marco Salma Edwin Noemi Pavel Dalia Simon Astrid Jonas Wanda Kofi Irene Matthias Selma Ruben Teresa Arjun Beatrix
Leon Camila Nils Ayesha Walter
""")
LAST = words("""
Keller Hardwick Solberg Alvarez Tanaka Conner Noor Petrov Martin Osei Haddad Larsen Bianchi Novak Fischer Okafor Duarte
Lindgren Kowalski Mehta Sato Moreau Costa Walsh Ibarra Jensen Popescu Rahman Vogel Adeyemi Brandt Castellano Dupont
Eriksen Farrow Gallagher Holm Ivanova Jaramillo Kimura Laurent Mancini Nyberg Orlov Pereira Quiroga Rossi Sandoval
Thorne Ueda Varga Winther Yilmaz Zeller Ashford Boateng Cardoso Demir Engel Fonseca Grimaldi Horvat Ismail Jokinen
""")


ATTRIBUTES: dict[str, Attribute] = {
    "city": Attribute(
        values=words(
            "Lisbon Osaka Denver Nairobi Prague Lima Dublin Hanoi Oslo Cairo Quebec Athens "
            "Tallinn Seville Perth Lagos Busan Turin Geneva Riga Boston Porto Kyoto Dakar"
        ),
        told=(
            "I met {name} again today. {first} has a flat in {value}, close to the station.",
            "{name} sent a long letter from {value}, where {first} has been living since spring.",
            "Note to self: {name} lives in {value} and has a spare room for guests.",
            "Talked to {name} on the phone for an hour. {first} is happy to live in {value}.",
            "{name} wrote me a postcard; the new house in {value} is finally furnished.",
            "If I ever travel to {value}, I should visit {name}, who lives there.",
        ),
        changed=(
            "{name} has moved again and now lives in {value}.",
            "Big news: {name} packed everything and settled in {value}.",
            "{name} left the old flat behind; the new home of {first} is in {value}.",
            "I updated the address of {name}, who moved to {value} last week.",
        ),
        said=(
            "By the way, I live in {value} these days.",
            "I finally found a flat in {value}, so that is home now.",
            "I have been living in {value} for a while now.",
            "My home is in {value}, and I would not want to leave.",
        ),
        asked=("Where does {name} live?", "In which city does {name} live?"),
    ),
    "job": Attribute(
        values=words(
            "welder dentist pilot baker carpenter nurse violinist plumber lawyer farmer sculptor chemist "
            "tailor sailor florist butcher librarian surveyor beekeeper locksmith jeweller gardener translator potter"
        ),
        told=(
            "{name} told me about work: {first} earns a living as a {value} and likes it a lot.",
            "By the way, {name} is a {value}; the workshop is around the corner.",
            "I need help on Monday, and {name} offered it, being a {value} by trade.",
            "{name} works as a {value} and starts every day at six.",
            "It turns out that {name} trained as a {value} and still works as one.",
            "We talked shop: {name} has been a {value} for ten years.",
        ),
        changed=(
            "{name} quit the old job and works as a {value} now.",
            "After a year of evening school {name} has become a {value}.",
            "{name} has changed careers: {first} is a {value} these days.",
            "The old office of {name} closed, and {first} found work as a {value}.",
        ),
        said=(
            "I work as a {value}, so my days start early.",
            "I make my living as a {value}, and it suits me.",
            "At work I am a {value}, in case you wondered.",
            "You know that I am a {value} by profession, right?",
        ),
        asked=("What does {name} work as?", "What is the profession of {name}?"),
    ),
    "dog": Attribute(
        values=words(
            "Pepper Biscuit Shadow Mango Ziggy Clover Nugget Rusty Pixel Waffle Comet Juno "
            "Bramble Truffle Marble Sparky Olive Tango Misty Rocket Button Cinder Pickle Domino"
        ),
        told=(
            "{name} has a dog. It is called {value} and sleeps all day long.",
            "I walked the dog of {name} this morning; {value} ran off twice.",
            "{name} asked me to feed {value}, the dog, over the weekend.",
            "{value} is the name of the dog that {name} took in from the shelter.",
            "The dog of {name}, which answers to {value}, chewed up my left shoe.",
            "{name} brought a dog named {value} to the picnic.",
        ),
        changed=(
            "{name} has a new dog; this one is called {value}.",
            "The old dog of {name} is with the neighbours now; the one at home is named {value}.",
            "{name} adopted another dog and named it {value}; the first one went to live with a cousin.",
            "There is a puppy at the house of {name} instead of the old dog. Its name is {value}.",
        ),
        said=(
            "My dog {value} kept me awake all night.",
            "I have to run, {value} needs a walk. Yes, that is my dog.",
            "My dog is called {value}, did I ever say?",
            "I gave my dog {value} a bath today, what a mess.",
        ),
        asked=("What is the name of {name}'s dog?", "What is the dog of {name} called?"),
    ),
    "dish": Attribute(
        values=words(
            "lasagna ramen paella goulash falafel risotto tacos dumplings curry pancakes sushi chili "
            "gnocchi couscous pierogi ceviche borscht moussaka kimchi fondue polenta tempura ratatouille burritos"
        ),
        told=(
            "We had dinner with {name} on Friday. {first}'s favourite dish is {value}, so I will cook that next time.",
            "Reminder for the party: {name} loves {value} more than any other dish.",
            "{name} asked for the recipe of my {value}, the dish {first} likes best.",
            "Ordering for {name} is easy: it is always {value}, the favourite dish.",
            "For the birthday of {name} there has to be {value}, the favourite dish since childhood.",
            "{name} told me that nothing tastes better than {value}.",
        ),
        changed=(
            "{name} is tired of the old favourite; the favourite dish of {first} is {value} now.",
            "These days {name} likes {value} best.",
            "Update for the party: {name} prefers {value} to every other dish now.",
            "{name} has discovered {value}, and it is the new favourite dish.",
        ),
        said=(
            "Nothing beats {value}, it is my favourite dish.",
            "I could eat {value} every day, I love it more than anything.",
            "My favourite dish is {value}, so guess what we had.",
            "I cooked {value} again. You know it is what I like best.",
        ),
        asked=("What is {name}'s favourite dish?", "Which dish does {name} like best?"),
    ),
    "instrument": Attribute(
        values=words(
            "cello trumpet harp accordion clarinet banjo flute drums piano mandolin oboe guitar "
            "viola trombone ukulele saxophone organ bassoon fiddle xylophone lute zither tuba harmonica"
        ),
        told=(
            "There was music next door: {name} plays the {value} in a band.",
            "{name} practises the {value} every evening before dinner.",
            "I lent my car to {name}, who had to take the {value} to a concert.",
            "{name} learned to play the {value} as a child and still plays it.",
            "At the wedding {name} played the {value} for an hour.",
            "The {value} in the hall belongs to {name}, who plays it rather well.",
        ),
        changed=(
            "{name} gave up the old instrument and plays the {value} now.",
            "{name} has switched to the {value}.",
            "From now on {name} plays the {value}; the old instrument was sold.",
            "{name} plays another instrument these days, the {value}.",
        ),
        said=(
            "I practised the {value} for two hours today.",
            "I play the {value} in a small band.",
            "I play the {value}, and my neighbours know it.",
            "I took my {value} to the rehearsal. Yes, I play it myself.",
        ),
        asked=("Which instrument does {name} play?", "What instrument does {name} play?"),
    ),
    "car": Attribute(
        values=words(
            "turquoise orange violet beige crimson silver maroon golden pink navy olive white "
            "purple yellow grey bronze scarlet ivory teal copper lilac black amber mint"
        ),
        told=(
            "I saw {name} at the gas station. The car of {first} is {value}.",
            "{name} picked me up in the {value} car.",
            "You cannot miss {name}: nobody else drives a {value} car.",
            "{name} drives a {value} car that is older than the two of us.",
            "Somebody scratched the {value} car of {name}.",
            "{name} washed the car on Sunday; in the sun it is really {value}.",
        ),
        changed=(
            "{name} had the car painted; it is {value} now.",
            "{name} sold the old car and drives a {value} one now.",
            "The new car of {name} is {value}.",
            "{name} bought another car, a {value} one, and gave the old one away.",
        ),
        said=(
            "I parked my {value} car in front of your door.",
            "My car is {value}, you cannot miss it.",
            "I drive a {value} car, as you may remember.",
            "Look for the {value} car, that is mine.",
        ),
        asked=("What colour is the car of {name}?", "What is the colour of {name}'s car?"),
    ),
}


@define(frozen=True)
class People:
    """Names, and what can be true of those who bear them."""

    first: Sequence[str]
    last: Sequence[str]
    attributes: Sequence[Attribute]


def people_of(split: Split) -> People:
    """Return the people of a split."""
    if split == "unseen":
        return People(unseen.FIRST, unseen.LAST, list(unseen.ATTRIBUTES.values()))
    if split == "fresh":
        return People(fresh.FIRST, fresh.LAST, list(fresh.ATTRIBUTES.values()))
    fields = ("values", "told", "changed", "said", "asked")
    halves = [{name: tuple(half(getattr(kind, name), split)) for name in fields} for kind in ATTRIBUTES.values()]
    attributes = [evolve(kind, **own) for kind, own in zip(ATTRIBUTES.values(), halves, strict=True)]
    return People(half(FIRST, split), half(LAST, split), attributes)


def half(items: Sequence[Item], split: Half) -> Sequence[Item]:
    """Return the items of a half: every other one."""
    return items[0::2] if split == "choose" else items[1::2]


def draw_names(count: int, split: Split, rng: random.Random) -> list[str]:
    """Return ``count`` different names of a split, first and last, in random order.

    Raises ValueError where there are not so many.
    """
    people = people_of(split)
    first, last = people.first, people.last
    if count > len(first) * len(last):
        raise ValueError(f"there are {len(first) * len(last):,} names of the split {split!r}, got a wish for {count:,}")
    pairs = rng.sample(range(len(first) * len(last)), count)
    return [f"{first[pair % len(first)]} {last[pair // len(first)]}" for pair in pairs]


def fill(sentence: str, name: str, value: str = "") -> str:
    """Return a sentence about a person."""
    return sentence.format(name=name, first=name.split(maxsplit=1)[0], value=value)
