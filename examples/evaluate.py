"""How much does a memory retain? Facts are told, many others after them, and each is asked for at several ages.

The decoder that comes with mplus answers in a little language. For a decoder and text of yours:
`mplus eval retention --model MODEL --protocol squad --data dev-v1.1.json`, see docs/evaluation.md.
"""

from importlib.resources import files

import mplus
from mplus.evaluation.execution import ParallelStreams
from mplus.evaluation.options import ArmOptions
from mplus.evaluation.retention import retention
from mplus.evaluation.tasks.facts import Facts

name = files("mplus") / "data" / "recall-tiny"  # or a decoder that you trained by the recipe "recall-tiny"
model = mplus.from_pretrained(name).eval()

# An age is the number of facts told since. Eight streams are asked four times each: 32 questions at every age.
task = Facts(ages=(0, 4, 16, 64), streams=8, rounds=4, seed=1)
arms = ArmOptions(arms=("none", "memoryllm", "mplus-random", "mplus"))
report = retention(ParallelStreams(model, task), arms)
for arm in report.arms:
    print(f"{arm.name}: " + ", ".join(f"{cell.accuracy:.0%} at age {cell.age}" for cell in arm.cells))
print(f"by chance: {report.chance:.0%}")
report.save("retention.json")  # with every setting, version and seed; and intervals, and bytes that were kept
