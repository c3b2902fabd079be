"""Other people, other things that are true of them, other sentences: no setting was chosen or tried on any of it."""

from __future__ import annotations

from mplus.evaluation.tasks.people.attributes import Attribute, words

FIRST = words("""
Agnes Boris Carmen Darius Edith Farid Gemma Hector Isolde Jasper Katya Lorenz Maeve Nikolai Odette Percy Quentin
Ramona Stefan Tamsin Ulrich Vanessa Wilfred Xenia Yusuf Zelda Alaric Bettina Cyrus Delphine Emeka Fiona
""")
LAST = words("""
Abernathy Birkeland Czerny Dunmore Escobar Fairbanks Gutierrez Hollis Ingram Jankowski Kaplan Lockwood Marchetti
Nakagawa Ostrowski Pemberton Rasmussen Silveira Tolliver Underhill Vasquez Whitaker Yamada Zimmer Aldridge Bergstrom
Caruso Delacroix Ekwueme Fitzroy Granger Hawthorne
""")

ATTRIBUTES: dict[str, Attribute] = {
    "sport": Attribute(
        values=words(
            "judo archery rowing fencing badminton squash curling karate handball climbing snorkelling cycling"
        ),
        told=(
            "Could not reach {name} this evening: on Tuesdays {first} goes to {value} training.",
            "{name} limped into the office. That is {value} for you, but {first} wants no other sport.",
            "The sport that {name} picked for the new year is {value}.",
            "Found the bag of {name} in my hall, full of things for {value}, which {first} does twice a week.",
        ),
        changed=(
            "The knee of {name} is better since the switch to {value}.",
            "{name} handed in the old club card and took up {value} instead.",
        ),
        said=("I was at {value} until nine.", "My sport is {value}, rain or shine."),
        asked=("Which sport does {name} do?",),
    ),
    "language": Attribute(
        values=words("Finnish Swahili Korean Hungarian Icelandic Welsh Arabic Hindi Basque Turkish Greek Vietnamese"),
        told=(
            "{name} keeps small cards by the sink, because {first} is learning {value}.",
            "On the train I sat next to {name}, who was repeating words in {value} for the evening course.",
            "{name} has signed up for a class in {value} and wants to practise with us.",
            "The present for {name} is easy: a novel in {value}, the language that {first} is studying.",
        ),
        changed=(
            "{name} dropped the first course and is learning {value} now.",
            "It is {value} that {name} studies now; the other textbook is for sale.",
        ),
        said=("I am learning {value}, slowly.", "My course in {value} starts again on Monday."),
        asked=("Which language is {name} learning?",),
    ),
    "drink": Attribute(
        values=words(
            "cocoa espresso lemonade cider chai kombucha matcha buttermilk rooibos cappuccino sherry horchata"
        ),
        told=(
            "At the cafe {name} did not even open the menu: {first} always has {value}.",
            "{name} came over for cards. I had no {value} in the house, the only proper drink for {first}.",
            "Shopping list: bread, candles, and {value}, since {name} drinks nothing else in the afternoon.",
            "The waiter knows {name} by now and brings {value}, the usual drink.",
        ),
        changed=(
            "{name} sleeps better since the usual drink became {value}.",
            "No more of the old stuff: {name} orders {value} now.",
        ),
        said=("I always order {value}.", "Give me {value} and I am happy."),
        asked=("What does {name} usually drink?",),
    ),
    "allergy": Attribute(
        values=words(
            "peanuts pollen shellfish celery feathers penicillin mustard strawberries wool soy hazelnuts sesame"
        ),
        told=(
            "Careful when {name} is here: {first} is allergic to {value}.",
            "We had to air the room for {name}, who cannot be near {value} because of an allergy.",
            "The doctor found out what made {name} sneeze for years. It was {value}.",
            "{name} reads every label twice because of an allergy to {value}.",
        ),
        changed=(
            "The new test of {name} came back: it is an allergy to {value}, and not to what they thought.",
            "{name} has outgrown the old allergy, and now has one to {value}.",
        ),
        said=("I am allergic to {value}.", "No {value} for me, I have an allergy."),
        asked=("What is {name} allergic to?",),
    ),
    "tree": Attribute(
        values=words("maple walnut cherry birch willow chestnut magnolia cypress hawthorn linden almond juniper"),
        told=(
            "{name} showed me round the garden. In the middle stands a {value}, the only tree {first} has.",
            "I helped {name} to rake leaves on Saturday; the {value} in that garden drops all of them at once.",
            "After the storm there is one tree left in the garden of {name}, a {value}.",
            "The swing for the children hangs from the {value} in the garden of {name}.",
        ),
        changed=(
            "{name} had the old tree felled, and planted a {value} in its place.",
            "In the garden of {name} a {value} grows now, where the other tree used to be.",
        ),
        said=("The {value} in my garden is in leaf.", "I planted a {value} behind the house."),
        asked=("Which tree stands in the garden of {name}?",),
    ),
    "month": Attribute(
        values=words("January February April June July August September October November December"),
        told=(
            "Wrote it on the calendar: the birthday of {name} is in {value}.",
            "{name} turned forty in {value}, and we have not stopped teasing since.",
            "{name} was born in {value}, just like my aunt.",
            "In {value} I must not forget the birthday card for {name}.",
        ),
        changed=(
            "I had that wrong: the birthday of {name} is in {value}.",
            "Correction for the calendar: {name} was born in {value}.",
        ),
        said=("My birthday is in {value}.", "I was born in {value}."),
        asked=("In which month is the birthday of {name}?",),
    ),
}
