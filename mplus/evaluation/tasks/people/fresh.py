"""A second such set of people, true things and sentences, made when settings had been chosen looking at the first."""

from __future__ import annotations

from mplus.evaluation.tasks.people.attributes import Attribute, words

FIRST = words("""
Abel Brigitte Cosmo Daphne Esteban Flora Gideon Harriet Ismene Joaquin Klara Ludovic Marta Nestor Orla Philippa Rufus
Sabine Thaddeus Ursula Valentin Winifred Yolanda Zoltan Anselm Belinda Casimir Dorothea Ezekiel Francesca Gunther Hester
""")
LAST = words("""
Arkwright Bellamy Crowther Dragomir Eastwood Falconer Galloway Hatzis Ibsen Juhasz Kirkland Lindqvist Montague Nwosu
Oyelaran Pritchard Quimby Radcliffe Steinberg Tremblay Usman Vandermeer Wojcik Yarrow Zielinski Ambrose Blackwood
Chevalier Dimitrov Ellsworth Fontaine Gascoigne
""")

ATTRIBUTES: dict[str, Attribute] = {
    "collection": Attribute(
        values=words("stamps coins postcards thimbles teapots maps seashells puppets clocks fossils keyrings lanterns"),
        told=(
            "The shelves at the flat of {name} are full: {first} collects {value}.",
            "Saw {name} at the flea market again, looking for {value} to add to the collection.",
            "{name} has been collecting {value} since school and knows the story of each one.",
            "A whole room in the house of {name} is given over to a collection of {value}.",
        ),
        changed=(
            "{name} sold everything off and collects {value} now.",
            "The collection of {name} has a new theme: it is {value} from now on.",
        ),
        said=("I collect {value}, as you can see.", "Another box of {value} for my collection arrived."),
        asked=("What does {name} collect?",),
    ),
    "commute": Attribute(
        values=words("tram ferry bicycle scooter moped subway canoe taxi tractor skateboard helicopter minibus"),
        told=(
            "{name} is never late for work, since the {value} {first} takes every morning runs on time.",
            "Rain or not, {name} goes to work by {value}.",
            "Asked {name} about the way to the office. The {value} is how {first} gets there.",
            "It takes {name} twenty minutes by {value} to reach the office.",
        ),
        changed=(
            "{name} gets to work by {value} now, which takes half as long.",
            "No more traffic for {name}: the {value} is the new way to the office.",
        ),
        said=("I take the {value} to work.", "My way to the office is by {value}."),
        asked=("How does {name} get to work?",),
    ),
    "books": Attribute(
        values=words(
            "thrillers biographies westerns fables sonnets comics memoirs travelogues satires mysteries romances epics"
        ),
        told=(
            "For the train I borrowed something from {name}, who reads nothing but {value}.",
            "{name} and I were in the bookshop; {first} went straight to the {value}.",
            "There is a pile of {value} next to the bed of {name}, whatever the reviews say.",
            "In the reading circle {name} always proposes {value}, the kind of book {first} enjoys.",
        ),
        changed=(
            "{name} is done with those books and reads {value} these days.",
            "The taste of {name} has changed: it has to be {value} now.",
        ),
        said=("I read {value} before I sleep.", "Give me a stack of {value} for the holidays."),
        asked=("What kind of books does {name} read?",),
    ),
    "boat": Attribute(
        values=words(
            "Albatross Mermaid Pelican Seagull Neptune Tempest Dolphin Horizon Wanderer Osprey Marlin Nautilus"
        ),
        told=(
            "Down at the harbour I found {name} painting a boat, the {value}.",
            "{name} invited us out on the water. The boat of {first} is called {value}.",
            "The {value}, moored at the end of the pier, is the boat of {name}.",
            "{name} spent all of the savings on a small boat and christened it {value}.",
        ),
        changed=(
            "{name} has a bigger boat now, named {value}.",
            "The boat of {name} was renamed; it is the {value} from this summer on.",
        ),
        said=("My boat is the {value}.", "I sail every Sunday, and my boat is called {value}."),
        asked=("What is the name of {name}'s boat?",),
    ),
    "subject": Attribute(
        values=words(
            "chemistry geography algebra Latin physics botany philosophy economics astronomy geometry ethics theology"
        ),
        told=(
            "My niece has {name} as a teacher, for {value}.",
            "{name} stands in front of a class every day and teaches {value}.",
            "The school found somebody for {value} at last, and it is {name}.",
            "{name} was marking papers all weekend, thirty of them, all in {value}, the subject {first} teaches.",
        ),
        changed=(
            "The school moved {name} to another subject: {first} teaches {value} now.",
            "Since the holidays {name} is a teacher of {value} instead.",
        ),
        said=("I teach {value}, mostly to the older ones.", "My subject at school is {value}."),
        asked=("Which subject does {name} teach?",),
    ),
    "heirloom": Attribute(
        values=words(
            "telescope loom anvil typewriter chandelier gramophone barometer sundial wardrobe hammock wheelbarrow "
            "samovar"
        ),
        told=(
            "The uncle of {name} died and left {first} a {value}.",
            "{name} had to rent a van to bring home the {value} that an uncle left behind in the will.",
            "In the hall of {name} there is an old {value}, inherited from an uncle.",
            "All that {name} inherited from the uncle was a {value}, and {first} is fond of it.",
        ),
        changed=(
            "The will was read again: what {name} inherited from the uncle is a {value}.",
            "It was a mistake of the notary; {name} gets the {value} of the uncle.",
        ),
        said=("My uncle left me a {value}.", "I inherited a {value} from my uncle."),
        asked=("What did {name} inherit from an uncle?",),
    ),
}
