"""The words of the little language, each in one set only."""

from __future__ import annotations

FIRST_NAMES = """
ada agnes alan albert alma amos anna anton basil bella bert boris bruno cara carl clara cyril daisy dora edgar edith
edwin ella elmer elsa emil emma enid erik ernst ethel eva felix flora frank freda fritz gerda grace greta gustav hanna
harold heidi helen henry hilda hugo ida igor ingrid irma isaac ivan jacob jane jonas judith julia karl klara knut laura
lena leon lotte louis lucy magnus marta max mila mina moritz nadia nina nora oscar paula peter
""".split()

LAST_NAMES = """
abbott adler archer arnold baker barlow becker bennet bishop bolton bowen bradley brandt burton butler carver chandler
clark cooper cramer dalton dawson dixon draper dreyer eaton ellis engel farmer fisher fletcher fowler foster frost
fuller gardner gibson glover graham hagen hammer harper hobson holt hooper hunter jensen keller kramer lambert larsen
lehmann marlow mason mercer meyer miller morgan morris murray nelson newton norton osborn palmer parker porter potter
quinn reeves ritter rogers sawyer schmidt shaw sutton tanner taylor thatcher turner
""".split()

VALUES = {
    "colour": """
    amber azure beige black blue bronze brown copper crimson cyan gold green grey indigo ivory jade khaki lilac magenta
    maroon mauve navy ochre pink purple red scarlet silver tan teal violet white
    """.split(),
    "town": """
    athens bergen berlin bern boston brest bristol cairo cardiff cork delhi dover dublin essen geneva ghent lima lisbon
    london lyon madrid malmo milan naples oslo oxford paris prague riga rome seoul turin
    """.split(),
    "pet": """
    badger beaver canary cat cobra crab crow dog donkey duck eagle ferret fox frog goat goose hamster hare hawk heron
    horse iguana lizard mouse otter owl parrot pony rabbit snail spider turtle
    """.split(),
    "fruit": """
    almond apple apricot banana cherry citron coconut currant date fig grape guava kiwi kumquat lemon lime lychee mango
    medlar melon mulberry nectarine nutmeg papaya peach pear plum pomelo quince raisin raspberry walnut
    """.split(),
}
"""Relation -> the words of its values: 32 each, so a guess is right once in 32."""

TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
UNITS = "one two three four five six seven eight".split()
"""A number is two words, one of each set: 64 values, so a guess is right once in 64."""

FILLERS = """
<other> the and to a in that was he it his her she with as had you for at on not but be him they said is have from all
which this
""".split()
"""Words that mean nothing here; every word that is not known becomes the first of them."""

PAD, BEGIN, UNKNOWN, OF, STOP = "<pad>", "<s>", "unknown", "of", "."
NUMBER = "number"
