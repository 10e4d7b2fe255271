"""One colour a method in every figure of the programs, drawn here from the stored results."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

import benchmark_memory
from benchmarks import report
from reproduction import common, memory_figure, vl_bart_figure

SCRIPTS = Path(__file__).parents[2] / "scripts"
GREY, ORANGE, BLUE, GREEN, OTHER = (
    to_rgb(name) for name in ("tab:gray", "tab:orange", "tab:blue", "tab:green", "lightgray")
)
Drawn = Callable[..., Figure]


def stored(path: str) -> Any:
    return json.loads((SCRIPTS / path).read_text(encoding="utf-8"))


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Drawn:
    """Call a function that draws, and return the figure that it gives to `save_figure`."""

    def draw(module: ModuleType, name: str, *arguments: object) -> Figure:
        figures: list[Figure] = []
        monkeypatch.setattr(module, "save_figure", lambda figure, path: figures.append(figure))
        getattr(module, name)(*arguments)
        (figure,) = figures
        return figure

    return draw


def runs_of(claim: str) -> SimpleNamespace:
    return SimpleNamespace(content=stored(f"reproduce/results/{claim}_laptop.json"), path=Path("drawn.json"))


def bar_colours(axes: Axes) -> list[tuple[float, ...]]:
    return [to_rgb(bar.get_facecolor()) for bar in axes.patches]


def by_tick(axes: Axes, axis: str) -> dict[str, tuple[float, ...]]:
    """The bars' colours by the words at the axis, one bar each."""
    labels = [label.get_text() for label in getattr(axes, f"get_{axis}ticklabels")()]
    return dict(zip(labels, bar_colours(axes), strict=True))


def expected(found: Mapping[str, object], colours: Mapping[str, tuple[float, ...]]) -> dict[str, tuple[float, ...]]:
    """Those of the colours whose name is among those found, and that they are all of them."""
    assert set(found) <= set(colours)
    return {name: colours[name] for name in found}


def colour(line: Line2D) -> tuple[float, ...]:
    return to_rgb(line.get_color())


@pytest.mark.parametrize("name", ["step_smollm2-135m_cpu", "idle_llama-512_cpu"])
def test_ratios_of_the_benchmark(drawn: Drawn, name: str) -> None:
    figure = drawn(report, "draw_ratios", stored(f"benchmarks/results/{name}.json"), Path("a.png"))
    panels = [axes for axes in figure.axes if axes.get_visible()]
    colours = {
        "lora": GREY, "lora_idle": GREY, "peft_dora": ORANGE, "peft_dora_cached": ORANGE, "dora": BLUE,
        "dora:torch": BLUE, "dora_idle": BLUE, "lora_floor": OTHER, "frozen": OTHER,
    }  # fmt: skip
    assert panels
    for axes in panels:
        found = by_tick(axes, "y")
        assert found
        assert found == expected(found, colours)


def test_every_contender_is_drawn_as_its_method() -> None:
    kinds = {"lora": GREY, "peft_dora": ORANGE, "dora": BLUE, "frozen": OTHER, "floor": OTHER}
    for name, (kind, _) in report.CONTENDERS.items():
        assert to_rgb(report.color(name)) == kinds[kind]


def test_memory_of_the_methods(drawn: Drawn) -> None:
    names = ("lora", "peft_dora", "dora", "dora_not_detached", "full")
    results = {name: {"peak_mib": 2.0, "saved_mib": 1.0, "time_s": 0.5} for name in names}
    figure = drawn(benchmark_memory, "draw_bars", results, "title", Path("a.png"))
    assert len(figure.axes) == 3
    for axes in figure.axes:
        assert bar_colours(axes) == [GREY, ORANGE, BLUE, BLUE, GREEN]


def test_accuracy_by_rank(drawn: Drawn) -> None:
    figure = drawn(common, "draw_ranks", runs_of("accuracy"), "title")
    assert figure.axes
    for axes in figure.axes:
        method, found = "", {}
        for line in axes.lines:
            # a method's means have its name, and its seeds follow them without
            method = method if line.get_label().startswith("_") else line.get_label()
            found.setdefault(method, set()).add(colour(line))
        assert found == {"LoRA": {GREY}, "DoRA": {BLUE}, "full fine-tuning": {GREEN}}
        assert bar_colours(axes) == [GREEN]


def test_the_norm_detached_or_not(drawn: Drawn) -> None:
    accuracy, memory = drawn(common, "draw_detach", runs_of("detach"), "model").axes
    assert bar_colours(accuracy)
    assert set(bar_colours(accuracy)) == {BLUE}
    assert bar_colours(memory) == [ORANGE, ORANGE, BLUE, BLUE]


def test_memory_beside_the_papers(drawn: Drawn) -> None:
    content = stored("reproduce/results/memory_laptop.json")
    figure = drawn(memory_figure, "draw", content["summary"], content, Path("memory_laptop.png"))
    paper = to_rgb(memory_figure.PAPER_COLOR)
    colours = {"ours": BLUE, "dense": ORANGE, "DoRA (PEFT)": ORANGE, "LoRA (PEFT)": GREY, "full fine-tuning": GREEN}
    for methods, savings in zip(figure.axes[::2], figure.axes[1::2], strict=True):
        labels = [label.get_text() for label in methods.get_yticklabels()]
        keys = ["dense" if ", dense" in label else "ours" if "ours" in label else label for label in labels]
        assert {"ours", "dense", "LoRA (PEFT)"} <= set(keys)
        assert [found for found in bar_colours(methods) if found != paper] == [colours[key] for key in keys]
        assert set(bar_colours(savings)) == {ORANGE}


def test_vl_bart(drawn: Drawn) -> None:
    left, right = drawn(vl_bart_figure, "draw", runs_of("vl_bart")).axes
    found = by_tick(left, "x")
    colours = {"LoRA": GREY, "DoRA": BLUE, "DoRA,\nnorm not\ndetached": BLUE, "full\nfine-tuning": GREEN}
    assert len(found) >= 3
    assert found == expected(found, colours)
    # beside the seeds, which are black, and the line at LoRA
    means = [colour(line) for line in right.lines if line.get_marker() == "o"]
    assert means == [colours[label.get_text()] for label in right.get_xticklabels()]
    assert GREY in {colour(line) for line in right.lines if line.get_label() == "LoRA"}
