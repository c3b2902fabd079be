"""Notes in plain English about invented people, for training: what can be true of them, told and asked in many ways.

Everything comes in two parts that share no first name, no last name, no value and no sentence: one to train with, and
one that is held out, by which a training is judged. Neither shares a sentence with the notes of ``mplus eval``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from attrs import define, field

Item = TypeVar("Item")

HELD_OUT = 5
"""One name and one value in so many is held out; of the ways to tell and to ask it is the last."""


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


FIRST = _words("""
Adele Albert Alma Amos Andrea Arthur Basil Bella Bernard Bianca Boris Bridget Caleb Carla Cedric Clara Colin Cora Daniel
Daphne Declan Diana Dominic Dora Edgar Edith Elena Elliot Emil Erica Ernest Esther Ethan Eva Fabian Faith Fergus Flora
Francis Frieda Gabriel Gemma Gerald Gloria Graham Gwen Harold Harriet Hector Helen Herbert Hilda Howard Ida Ingo Isabel
Ismael Ivy Jacob Jasmin Jerome Joan Joel Judith Julian Karla Keith Kirsten Laszlo Laura Leonard Lydia Luther Mabel
Malcolm Margot Marvin Martha Maurice Melanie Milo Miriam Moritz Nancy Nathan Nina Norbert Olive Orlando Paula Percy
Petra Philip Phoebe Quentin Rachel Ralph Rebecca Rita Robin Roland Ruth Sandra Sebastian Sidney Sonia Stella Theodor
Thelma Ulrich Ursula Valerie Vincent Vera Wesley Wilma Xavier Yvonne Zelda
""")
LAST = _words("""
Abbott Ackerman Archer Armstrong Baker Barlow Baxter Bennett Bishop Blake Bolton Bradley Bryant Burton Calloway Carver
Chandler Clifton Cooper Crane Dalton Dawson Delgado Dixon Drummond Eastwood Elliott Emerson Everett Fairchild Fleming
Forrest Foster Franklin Garcia Gardner Gibson Goodwin Granger Hale Hammond Harper Hawkins Hayward Henderson Holloway
Hudson Hughes Ingram Irving Jarvis Jefferson Kendall Kenyon Kirby Knight Lambert Langley Lawson Lennox Lowell MacKay
Mallory Marlowe Mason Mercer Merrick Mitchell Monroe Morrison Nash Nelson Newman Norton Oakley Osborne Palmer Parker
Patel Pemberton Porter Preston Quinn Radcliffe Ramsey Redmond Reeves Riley Robbins Russell Sawyer Schubert Sheldon
Sinclair Slater Spencer Stafford Sterling Sullivan Tanner Thatcher Townsend Tucker Turner Vance Vaughan Wagner Walker
Warner Waters Webster Weiss Whitaker Winslow Woodward Wright Yates Young Zimmer
""")


@define(frozen=True, kw_only=True)
class Relation:
    """Something that is true of a person.

    Attributes:
        values: words it can be.
        told: sentences that tell it, with ``{name}`` and ``{value}``.
        asked: questions, with ``{name}``.
    """

    values: tuple[str, ...] = field(converter=_words)
    told: tuple[str, ...]
    asked: tuple[str, ...]


RELATIONS: dict[str, Relation] = {
    "home": Relation(
        values="""Berlin Madrid Chicago Vienna Toronto Naples Helsinki Mumbai Dublin Lyon Warsaw Glasgow Havana Milan
        Cologne Bangkok Seattle Bergen Antwerp Jakarta Florence Zurich Manila Houston Leipzig""",
        told=(
            "The home of {name} is in {value}.",
            "{name} rents a small house in {value}.",
            "For two years now {name} has been at home in {value}.",
            "{name} came to {value} as a student and stayed there.",
            "The letters of {name} always have the stamp of {value}, the town where the family lives.",
        ),
        asked=(
            "What town does {name} live in?",
            "Where is the home of {name}?",
            "Which city is {name} at home in?",
        ),
    ),
    "birthplace": Relation(
        values="""Norway Brazil Kenya Poland Canada Egypt Chile Japan Greece India Cuba Latvia Spain Turkey Ghana Peru
        Finland Malta Nepal Iceland Jordan Mexico Sweden Vietnam Uganda""",
        told=(
            "{name} was born in {value}.",
            "The birthplace of {name} is a village in {value}.",
            "{name} grew up in {value} and still speaks the language.",
            "It was in {value} that {name} came into the world.",
            "{name}, a native of {value}, told us about the winters there.",
        ),
        asked=("Which country does {name} come from?", "Where was {name} born?", "What is the home country of {name}?"),
    ),
    "trade": Relation(
        values="""teacher mason barber painter miner shepherd printer cook driver waiter tanner brewer weaver judge
        poet dancer singer guard porter cooper clerk banker hunter actor glazier""",
        told=(
            "The profession of {name} is {value}.",
            "{name} found a post as a {value} in the old town.",
            "Every morning {name} goes to work as a {value}.",
            "They say that {name} is the best {value} in the county.",
            "{name} wanted to be a doctor and became a {value} in the end.",
        ),
        asked=("What is the job of {name}?", "What kind of work does {name} do?", "How does {name} earn a living?"),
    ),
    "pet": Relation(
        values="""parrot goat turtle rabbit pony hamster ferret canary lizard donkey goose hedgehog spider snake pigeon
        mouse owl duck crab monkey sheep falcon frog rooster raven""",
        told=(
            "{name} keeps a {value} in the garden.",
            "The pet of {name} is a {value}.",
            "{name} never travels without the tame {value}.",
            "A {value} has been living with {name} since last spring.",
            "{name} found a hurt {value} on the road and kept it as a pet.",
        ),
        asked=(
            "What pet does {name} have?",
            "Which animal does {name} keep?",
            "What kind of animal lives with {name}?",
        ),
    ),
    "colour": Relation(
        values="""red blue green purple brown silver black pink beige indigo white gold orange maroon cyan crimson khaki
        yellow amber violet scarlet grey magenta turquoise bronze""",
        told=(
            "The favourite colour of {name} is {value}.",
            "{name} said: My favourite colour is {value}.",
            "{name} likes {value} best of all colours.",
            "Everything in the room of {name} is {value}, the colour that pleases the owner most.",
            "If you paint the door for {name}, take {value}, the favourite colour.",
        ),
        asked=(
            "What is {name}'s favourite colour?",
            "Which colour does {name} like best?",
            "What colour does {name} prefer?",
        ),
    ),
    "fruit": Relation(
        values="""plums cherries pears melons grapes figs lemons dates apples mangoes peaches kiwis bananas apricots
        limes quinces walnuts raspberries oranges papayas almonds currants coconuts olives chestnuts""",
        told=(
            "{name} is fond of {value}.",
            "Above all fruit {name} likes {value}.",
            "{name} bought a basket of {value}, the favourite fruit.",
            "For dessert {name} always asks for {value}.",
            "{name} would walk a mile for a bowl of fresh {value}.",
        ),
        asked=(
            "What fruit does {name} like best?",
            "What is {name}'s favourite fruit?",
            "Which fruit does {name} love?",
        ),
    ),
    "sport": Relation(
        values="""tennis rowing boxing chess hockey fencing golf archery cricket skiing judo rugby sailing cycling
        badminton swimming bowling polo curling climbing squash skating wrestling baseball surfing""",
        told=(
            "{name} spends the weekends on {value}.",
            "The sport of {name} is {value}.",
            "{name} won a prize in {value} at school.",
            "Since the accident {name} only watches {value}, once a beloved sport.",
            "In the free hours {name} is busy with {value} and nothing else.",
        ),
        asked=("Which sport does {name} do?", "What is {name}'s sport?", "What does {name} do for sport?"),
    ),
    "subject": Relation(
        values="""botany law physics history medicine algebra geology theology Latin chemistry music logic economics
        astronomy zoology geography philosophy drama poetry biology optics statistics Greek pottery design""",
        told=(
            "{name} studied {value} at the university.",
            "{name} reads nothing but books about {value}.",
            "The subject of {name} at college was {value}.",
            "{name} took a degree in {value} and never used it.",
            "Ask {name} about {value}; that is the field of study that was chosen.",
        ),
        asked=("What did {name} study?", "What is the subject of {name}?", "Which field did {name} study?"),
    ),
    "drink": Relation(
        values="""coffee cider milk beer cocoa lemonade sherry rum tea brandy wine punch whisky mead port cognac soda
        gin ale buttermilk water vodka juice champagne broth""",
        told=(
            "{name} drinks {value} with every meal.",
            "The usual drink of {name} is {value}.",
            "Bring some {value}, because {name} drinks nothing else.",
            "{name} ordered {value}, as on every other evening.",
            "There must be {value} in the house when {name} comes to visit.",
        ),
        asked=("What does {name} drink?", "What is the usual drink of {name}?", "Which drink does {name} order?"),
    ),
    "day": Relation(
        values="Monday Tuesday Wednesday Thursday Friday Saturday Sunday January March May July September November",
        told=(
            "{name} will be back in town on {value}.",
            "The visit of {name} is planned for {value}.",
            "{name} promised to call on {value}.",
            "We agreed with {name} upon {value} for the meeting.",
            "Keep {value} free, since that is when {name} arrives.",
        ),
        asked=("When does {name} come?", "When is the visit of {name}?", "For when is {name} expected?"),
    ),
    "treasure": Relation(
        values="""compass lantern violin mirror dagger teapot locket telescope map umbrella ring diary clock crown
        candle coin saddle vase necklace carpet hammer helmet basket shawl flute""",
        told=(
            "{name} inherited a {value} from an aunt.",
            "An old {value} is the greatest treasure of {name}.",
            "{name} would never sell the {value} that came from the grandparents.",
            "On the desk of {name} stands a {value}, a gift from long ago.",
            "When the house burned, {name} saved nothing but the {value}.",
        ),
        asked=(
            "What is the treasure of {name}?",
            "What did {name} inherit?",
            "Which old thing does {name} keep?",
        ),
    ),
    "transport": Relation(
        values="""bicycle tram train horse ferry scooter canoe bus motorcycle taxi sledge boat truck wagon ship tractor
        subway van carriage raft balloon cart lorry yacht gondola""",
        told=(
            "{name} goes to the office by {value}.",
            "{name} came to the party by {value}, as always.",
            "To visit the parents {name} takes the {value}.",
            "Nothing but the {value} will do when {name} travels.",
            "{name} sold the car last year and uses the {value} instead.",
        ),
        asked=("How does {name} travel?", "How does {name} get about?", "What does {name} travel by?"),
    ),
    "language": Relation(
        values="""Dutch Hindi Welsh Korean Danish Arabic Finnish Hebrew Polish Swahili Czech Turkish Irish Persian
        Russian Catalan Greek Thai Basque Bengali Hungarian Norwegian Urdu Malay Gaelic""",
        told=(
            "{name} is learning {value} with a private teacher.",
            "{name} talks to the children in {value}.",
            "The mother of {name} spoke {value} and taught it to the child.",
            "{name} translates novels from {value}.",
            "In the dreams of {name} everybody speaks {value}.",
        ),
        asked=("Which language does {name} know?", "What language does {name} speak?", "Which tongue does {name} use?"),
    ),
    "plant": Relation(
        values="""roses tulips beans onions carrots lilies pumpkins herbs daisies tomatoes peas violets cabbages orchids
        mint potatoes sunflowers lavender garlic ferns spinach poppies radishes clover pansies""",
        told=(
            "{name} grows {value} behind the house.",
            "In the garden of {name} there are only {value}.",
            "{name} sells {value} at the market.",
            "{name} planted {value} along the fence this year.",
            "The neighbours envy {name} for the splendid {value} in the front yard.",
        ),
        asked=("What does {name} grow?", "What is there in {name}'s garden?", "Which plants does {name} grow?"),
    ),
    "sibling": Relation(
        values="""Agatha Bertram Celeste Dennis Eugene Felicity Gilbert Heather Irwin Jessica Kurt Lorna Monica Neville
        Odette Patrick Rosalind Stuart Tabitha Victor Winifred Agnes Conrad Doris Hubert""",
        told=(
            "{name} has a twin called {value}.",
            "{value} is the twin of {name}.",
            "{name} and {value} are twins, though nobody would believe it.",
            "At the door stood {name} together with the twin, {value}.",
            "People often take {name} for {value}, the other one of the twins.",
        ),
        asked=("Who is the twin of {name}?", "What is the name of {name}'s twin?", "What is {name}'s twin called?"),
    ),
    "fear": Relation(
        values="""thunder heights wolves ghosts dentists darkness bees snakes storms fire cats clowns needles rats water
        bats strangers mirrors elevators spiders crowds horses silence doctors dolls""",
        told=(
            "{name} is afraid of {value}.",
            "Since childhood {name} has had a terrible fear of {value}.",
            "Nothing frightens {name} but {value}.",
            "{name} laughs at every danger, except for {value}.",
            "Do not speak of {value} to {name}, who cannot sleep afterwards for fear.",
        ),
        asked=("What is {name} afraid of?", "What frightens {name}?", "What does {name} fear?"),
    ),
}


def part(items: Sequence[Item], held_out: bool) -> tuple[Item, ...]:
    """Return the names or values to train with, or those that are held out: one in ``HELD_OUT``."""
    return tuple(item for place, item in enumerate(items) if (place % HELD_OUT == HELD_OUT - 1) == held_out)


def sentences(items: Sequence[str], held_out: bool) -> tuple[str, ...]:
    """Return the sentences to train with, or the one that is held out: the last."""
    return tuple(items[-1:] if held_out else items[:-1])
