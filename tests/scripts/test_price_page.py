"""README's table and the page of what a training step costs beside LoRA."""

from typing import Any

import pytest

from benchmarks import libraries, price, price_page


def stored(name: str, price_name: str = price_page.OURS, **medians: float) -> dict[str, Any]:
    """A setting's entry in price_cpu.json with these ratios by library."""
    return {
        "setting": price.SETTINGS[name].describe(),
        "processes": 5,
        "rounds": 15,
        "machine": {
            "processor": "Some CPU",
            "instruction_sets": {"torch": "AVX2", "processor": ["avx2", "fma"]},
            "threads": 2,
            "versions": {"torch": "1.2"},
            "commit": "0123456789",
        },
        "prices": {
            library: {price_name: {"median": value, "least": value - 0.01, "most": value + 0.02}}
            for library, value in medians.items()
        },
    }


def report(**settings: Any) -> dict[str, Any]:
    return {"seed": 17, "settings": {name.replace("_", "-"): entry for name, entry in settings.items()}}


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_columns_are_the_libraries() -> None:
    assert tuple(price_page.LIBRARIES) == libraries.LIBRARIES


def test_names_are_those_of_the_benchmark() -> None:
    prices = {name for setting in price.SETTINGS.values() for name in setting.prices}
    assert prices == {price_page.OURS, price_page.COMPILED, price_page.EAGER}
    for beginning, _ in [*price_page.GOALS, *((name, priced) for _, name, priced in price_page.LINES)]:
        found = [name for name in price.SETTINGS if name == beginning or name.startswith(beginning)]
        assert found, beginning


@pytest.mark.parametrize("name", price.ALL)
def test_every_setting_has_a_goal_and_a_line_in_readme(name: str) -> None:
    priced = next(iter(price.SETTINGS[name].prices))
    assert price_page.goal(name, priced, "torch") is not None
    entry = stored(name, priced, torch=1.0)
    assert len(price_page.price_table({"seed": 1, "settings": {name: entry}}).splitlines()) == 5


def test_a_goal_is_that_of_its_own_setting() -> None:
    assert price_page.goal("llama-512", price_page.OURS, "torch") == 0.98
    assert price_page.goal("llama-512-dropout", price_page.OURS, "torch") == 0.9
    assert price_page.goal("short", price_page.OURS, "default") is None


def test_a_page_says_which_goals_are_met() -> None:
    found = report(llama_512=stored("llama-512", torch=0.98, same=0.981, default=0.5))
    line = cells(price_page.price_page(found).split("|---:|\n")[-1].splitlines()[0])
    assert line[:4] == ["llama-512", "4 x 256, 512, 16, 0", "0.8 %", price_page.OURS]
    assert line[4:] == [
        "**0.500** [1.00] (0.490 to 0.520)",
        "**0.980** [0.98] (0.970 to 1.000)",
        "0.981 [0.98] (0.971 to 1.001)",
    ]


def test_readme_gives_a_median_of_the_drawn_shapes() -> None:
    found = report(
        drawn_1=stored("drawn-1", torch=1.0), drawn_2=stored("drawn-2", torch=1.2), drawn_3=stored("drawn-3", torch=1.1)
    )
    heading, *_, line = price_page.price_table(found).splitlines()
    assert cells(line)[1:] == ["-", "1.10 (1.00 to 1.20)", "-"]
    assert "Some CPU (avx2 fma), 2 threads (torch 1.2), commit 012345678" in heading


def test_a_page_says_where_the_time_goes() -> None:
    found = {"library": "torch", "steps": 2, "machine": {"commit": "0123456789"}}
    ms = {"lora": {"products": 2.0, "copies": 0.5}, "dora": {"products": 2.25, "copies": 0.25}}
    page = price_page.price_page(report(short=stored("short", torch=1.0)), {"profiles": {"short": found | {"ms": ms}}})
    assert "short, oneDNN off, ms a step, mean of 2 (commit 012345678):" in page
    assert "| products | 2.0 | 2.2 | +0.2 |" in page
    assert page.endswith("| in all | 2.5 | 2.5 | +0.0 |\n")


def test_without_results() -> None:
    assert price_page.price_table(None) == ""
    assert price_page.price_page(None).endswith("not measured yet\n")


def test_the_norms_share_is_of_multiplications() -> None:
    """Counted on 24 x 16, r=3, 2 x 5 tokens: W0 A^T against forward and backward through W0."""
    out, width, rank, tokens = 24, 16, 3, 10
    setting = {"rank": rank, "batch": 2, "seq_len": 5}
    assert price_page.norm_share(setting) == (out * width * rank) / (2 * tokens * out * width)
