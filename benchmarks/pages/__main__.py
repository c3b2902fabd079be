"""Write every page and figure that is made from records, and what the README quotes: ``python -m benchmarks.pages``."""

from benchmarks.pages import (
    architectures,
    chat,
    field,
    gpu,
    index,
    memory,
    plan,
    quality,
    readme,
    retrieval,
    serving,
    speed,
    training,
)

for page in (index, chat, quality, memory, speed, retrieval, gpu, serving, plan, architectures, training, field):
    page.PAGE.write_text(page.render(), encoding="utf-8")
for page in (memory, speed, retrieval):
    for figure, drawn in page.figures().items():
        figure.write_text(drawn, encoding="utf-8")
quality.draw_figure()
readme.PAGE.write_text(readme.render(readme.PAGE.read_text(encoding="utf-8")), encoding="utf-8")
