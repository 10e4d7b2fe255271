"""VL-BART: the model, its data, the settings in configs/, and the claim at toy size."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from finetune_fixtures import write_jsonl
from safetensors.torch import load_file, save_file

from reproduction import vl_bart as subject
from reproduction.common import Options, at_edge, interval, lowest
from vl_bart import data as data
from vl_bart.model import (
    VlBartForConditionalGeneration,
    build_small,
)

CPU = torch.device("cpu")
CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("vl_bart_*.yaml"))


def write_data(folder, pictures=12):
    """Pictures of one of two colours, and questions about them."""
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    for part in ("train", "test"):
        features = torch.randint(256, (pictures, 64, 448), dtype=torch.uint8)
        save_file({"features": features}, folder / f"{part}.safetensors")
        questions = [("what color is it?", "red"), ("what is the red shape?", "circle"), ("is it a circle?", "yes")]
        records = [{"picture": i, "question": q, "answer": a} for i in range(pictures) for q, a in questions]
        write_jsonl(folder / f"{part}.jsonl", records)


def test_there_are_configs():
    assert [path.stem for path in CONFIGS] == ["vl_bart_easy_vqa", "vl_bart_image", "vl_bart_video"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configs(path):
    settings = subject.load_settings(path)
    head = path.read_text(encoding="utf-8").split("\n\n")[0]
    assert f"configs/{path.name}" in head
    assert settings.target_modules == ["q_proj", "v_proj"]
    # the paper's
    if path.stem == "vl_bart_image":
        assert (settings.r, settings.lora_alpha, settings.batch, settings.epochs) == (128, 128, 300, 20)
        assert settings.learning_rates["dora"] == [1e-3]
    if path.stem == "vl_bart_video":
        assert (settings.r, settings.batch, settings.epochs) == (128, 40, 7)
        assert settings.learning_rates["dora"] == [3e-4]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"typo": 1}, "unknown field 'typo'"),
        ({"epochs": 1}, "one of steps and epochs"),
        ({"backbone_steps": 0}, "backbone_pattern and backbone_steps"),
        ({"learning_rates": {"lora": [1.0], "dora": [1.0, 2.0], "full": [1.0]}}, "as many for lora"),
        ({"learning_rates": {m: ["1e-3"] for m in ("lora", "dora", "full")}}, "with a point, found '1e-3'"),
        ({"seeds": []}, "seeds: expected at least one"),
        ({"model": "facebook/bart-base"}, "train_visual_embedding: expected true with model facebook/bart-base"),
    ],
)
def test_bad_settings(change, message, tmp_path):
    values = yaml.safe_load(CONFIGS[0].read_text(encoding="utf-8"))
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values | change), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        subject.load_settings(path)


@pytest.mark.parametrize(("text", "message"), [("r: [16\n", "config.yaml: expected YAML"), ("", "found NoneType")])
def test_what_is_no_yaml_of_settings(text, message, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        subject.load_settings(path)


def test_a_seed_that_is_given_twice_counts_once(tmp_path):
    values = yaml.safe_load(CONFIGS[0].read_text(encoding="utf-8"))
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values | {"seeds": [2, 0, 2]}), encoding="utf-8")
    assert subject.load_settings(path).seeds == [2, 0]


@pytest.fixture
def toy_options(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path / "data/easy_vqa")
    return Options(data=tmp_path / "data", results=tmp_path / "results", dry_run=True)


@pytest.fixture
def count_backbones(monkeypatch):
    trained, original = [], subject.Task.train_backbone

    def train(task, folder):
        trained.append(folder.name)
        return original(task, folder)

    monkeypatch.setattr(subject.Task, "train_backbone", train)
    return trained


def content_of(options):
    return json.loads(options.path("vl_bart").read_text(encoding="utf-8"))


def backbones():
    return sorted(path.name for path in Path("outputs/reproduce").iterdir())


def test_the_claim_at_toy_size(toy_options, count_backbones, capsys):
    subject.run(toy_options, seeds=(0, 1))
    content = content_of(toy_options)
    summary, runs = content["summary"], content["runs"]
    assert set(summary["methods"]) == set(subject.METHODS)
    for method, entry in summary["methods"].items():
        losses = {
            run["rate"]: run["validation_loss"]
            for run in runs.values()
            if (run.get("method"), run.get("seed")) == (method, 0)
        }
        assert (entry["rate"], entry["edge"]) == (lowest(losses)[0], at_edge(entry["rate"], losses))
        assert len(losses) == 3
        of_seeds = [runs[f"{method} lr={entry['rate']:g} seed={seed}"]["accuracy"] for seed in (0, 1)]
        assert entry["accuracies"] == of_seeds
    for other in ("lora", "full", "dora_not_detached"):
        pairs = zip(*(summary["methods"][m]["accuracies"] for m in ("dora", other)), strict=True)
        assert summary["differences"][f"dora - {other}"] == interval([a - b for a, b in pairs])
    assert {"question_only", "before"} < set(summary)
    assert (summary["num_test"], summary["num_validation"]) == (12, 2)
    printed = capsys.readouterr().out
    assert "[17/17] full" in printed
    assert "dora - lora: " in printed
    assert "12 test questions, 2 to choose the rate by" in printed
    assert toy_options.path("vl_bart").with_suffix(".png").stat().st_size > 10000
    # whole, and no temporary one
    assert backbones() == count_backbones
    # again: the backbone and every run are there
    subject.run(toy_options, seeds=(0, 1))
    assert content_of(toy_options)["runs"] == runs
    assert len(count_backbones) == 1


def test_the_loss_of_validation_is_per_token(toy_options):
    subject.run(toy_options, seeds=(0,))
    task = subject.Task(subject.toy(subject.load_settings(CONFIGS[0])), toy_options)
    task.tokenizer = data.word_tokenizer(task.whole.records)
    model = VlBartForConditionalGeneration.from_pretrained(Path("outputs/reproduce") / task.backbone).eval()
    # answers of one word, in several batches
    part = task.whole
    part.records = part.records * 10
    part.records[-1] = part.records[-1] | {"answer": "red red red"}
    accuracy, loss = task.evaluate(model, part)
    with torch.no_grad():
        batch = data.make_batch(part, part.records, task.tokenizer)
        output = model(**batch)
    assert loss == pytest.approx(output.loss.item(), rel=1e-5)
    assert (batch["labels"] != data.IGNORE).sum() == 2 * 360 + 2
    hits = (output.logits.argmax(-1) == batch["labels"]) | (batch["labels"] == data.IGNORE)
    assert accuracy == hits.all(1).float().mean().item()


def test_pictures_swapped_between_questions(toy_options, monkeypatch):
    task = subject.Task(subject.toy(subject.load_settings(CONFIGS[0])), toy_options)
    task.tokenizer = data.word_tokenizer(task.whole.records)
    model = build_small(task.tokenizer, d_model=16, layers=1, visual_dim=448, visual_tokens=64)
    shown, make = [], subject.make_batch

    def keep(part, records, tokenizer, pictures):
        shown.extend(zip([record["picture"] for record in records], pictures, strict=True))
        return make(part, records, tokenizer, pictures)

    monkeypatch.setattr(subject, "make_batch", keep)
    task.evaluate(model, task.test)
    assert all(own == other for own, other in shown)
    shown.clear()
    task.evaluate(model, task.test, swapped=True)
    assert all(own != other for own, other in shown)
    assert sorted(own for own, _ in shown) == sorted(other for _, other in shown)


def test_nothing_is_trained_on_the_pictures_that_choose_the_rate(toy_options):
    task = subject.Task(subject.toy(subject.load_settings(CONFIGS[0])), toy_options)
    held_out = {record["picture"] for record in task.validation.records}
    assert held_out
    for part in (task.train, task.backbone_part):
        assert held_out.isdisjoint(record["picture"] for record in part.records)


def test_another_model_by_the_command_line(toy_options, monkeypatch):
    asked = []

    class Stop(Exception):
        pass

    def load(name, *args, **kwargs):
        asked.append(name)
        raise Stop

    monkeypatch.setattr(subject.AutoTokenizer, "from_pretrained", load)
    with pytest.raises(Stop):
        subject.run(dataclasses.replace(toy_options, dry_run=False), seeds=(0,), model="facebook/bart-base")
    assert asked == ["facebook/bart-base"]


def test_every_backbone_has_its_folder(toy_options, count_backbones, tmp_path):
    values = yaml.safe_load(CONFIGS[0].read_text(encoding="utf-8"))
    config = tmp_path / "config.yaml"

    def run(**change):
        config.write_text(yaml.safe_dump(values | change), encoding="utf-8")
        subject.run(toy_options, config, seeds=(0,))

    run()
    # one that it depends on
    run(warmup=0.5)
    assert len(set(count_backbones)) == 2
    assert backbones() == sorted(count_backbones)
    before = content_of(toy_options)["runs"]
    shutil.rmtree(Path("outputs/reproduce") / count_backbones[-1])
    # it is missing: trained again, and nothing else
    run(warmup=0.5)
    assert len(count_backbones) == 3
    assert backbones() == sorted(set(count_backbones))
    runs = content_of(toy_options)["runs"]
    assert {key: run for key, run in runs.items() if key != "backbone"} == {
        key: run for key, run in before.items() if key != "backbone"
    }
    # on a machine where another one comes of it, what is stored is no longer of it
    path = Path("outputs/reproduce") / count_backbones[-1] / "model.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="expected runs of the model and data with digest"):
        run(warmup=0.5)


def test_force_trains_the_backbone_again(toy_options, count_backbones):
    subject.run(toy_options, seeds=(0,))
    folder = Path("outputs/reproduce") / count_backbones[0]
    (folder / "stale").touch()
    subject.run(dataclasses.replace(toy_options, force=True), seeds=(0,))
    assert count_backbones == [folder.name] * 2
    assert not (folder / "stale").exists()


def test_the_backbone_depends_on_what_it_is_trained_with(toy_options):
    settings = subject.load_settings(CONFIGS[0])

    def digest(**change):
        return subject.Task(dataclasses.replace(settings, **change), toy_options).backbone

    assert digest() == digest(steps=3, batch=3, r=2, seeds=[7], learning_rates={}, max_test=3)
    changes = [
        {"backbone_steps": 5},
        {"backbone_batch": 3},
        {"d_model": 8},
        {"layers": 1},
        {"backbone_learning_rate": 0.1},
    ]
    changes += [{"warmup": 0.2}, {"visual_tokens": 99}, {"visual_dim": 99}, {"backbone_pattern": "is it.*"}]
    found = [digest(), *(digest(**change) for change in changes)]
    found.append(subject.Task(settings, dataclasses.replace(toy_options, dry_run=False)).backbone)
    path = toy_options.data / "easy_vqa/train.safetensors"
    features = load_file(path)["features"]
    features[3, 2, 1] += 1
    save_file({"features": features}, path)
    found.append(digest())
    assert len(set(found)) == len(changes) + 3


@pytest.mark.parametrize("config", [None, *CONFIGS], ids=lambda path: path and path.stem)
def test_a_dry_run_of_full_size_stays_at_home(config, toy_options, monkeypatch):
    def fetch(*args, **kwargs):
        raise AssertionError("a dry run went to the Hub")

    monkeypatch.setattr(subject.AutoTokenizer, "from_pretrained", fetch)
    monkeypatch.setattr(VlBartForConditionalGeneration, "from_bart", fetch)
    subject.run(dataclasses.replace(toy_options, size="full"), config, seeds=(0,))
    content = content_of(dataclasses.replace(toy_options, size="full"))
    assert (content["settings"]["model"], content["settings"]["dataset"]) == (None, "easy_vqa")
    assert content["settings"]["steps"] == 2
    assert not any(entry["edge"] for entry in content["summary"]["methods"].values()) or config == CONFIGS[0]


def test_no_question_of_that_kind(toy_options):
    settings = subject.load_settings(CONFIGS[0])
    for change in ({"pattern": "why.*"}, {"backbone_pattern": "why.*"}):
        with pytest.raises(ValueError, match=r"easy_vqa: no question fits the pattern 'why\.\*'"):
            subject.Task(dataclasses.replace(settings, **change), toy_options)


def draw_summary(tmp_path, monkeypatch, dataset):
    """Draw made-up figures, and return the figure's texts."""
    from matplotlib.figure import Figure

    values = {"lora": [0.80, 0.82], "dora": [0.85, 0.84], "dora_not_detached": [0.84, 0.85], "full": [0.9, 0.91]}
    methods = {
        method: {"accuracies": accuracies, "mean": sum(accuracies) / 2, "swapped": 0.3}
        for method, accuracies in values.items()
    }
    runs = subject.Runs("vl_bart", Options(results=tmp_path), {"dataset": dataset})
    runs.content["summary"] = {"methods": methods, "question_only": 0.4, "num_test": 300}
    drawn, save = [], Figure.savefig

    def keep(figure, *args, **kwargs):
        drawn.append(figure)
        save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)
    subject.draw(runs)
    return drawn[0]


@pytest.mark.parametrize(
    ("dataset", "paper"), [("easy_vqa", None), ("vl_bart_image", "(paper 76.5)"), ("vl_bart_video", "(paper 83.5)")]
)
def test_the_figure(dataset, paper, tmp_path, monkeypatch):
    from matplotlib.text import Text

    figure = draw_summary(tmp_path, monkeypatch, dataset)
    texts = [text for text in figure.findobj(Text) if text.get_text()]
    assert any("paper" in text.get_text() for text in texts) == (paper is not None)
    assert paper is None or any(paper in text.get_text() for text in texts)
    assert min(text.get_fontsize() for text in texts) >= 9
    left, right = figure.axes
    assert left.get_ylim()[1] > 100
    assert left.get_ylim()[0] == 0
    points = [
        sorted(line.get_ydata()) for line in right.lines if len(line.get_ydata()) == 2 and line.get_marker() == "."
    ]
    # of DoRA, paired by seed
    assert points[0] == pytest.approx([2, 5])
    assert "+3.5" in [text.get_text() for text in texts]
