"""VL-BART: the model, its data, the settings in configs/, and the claim at toy size."""

import json
import zipfile
from pathlib import Path

import pytest
import torch
import yaml
from finetune_fixtures import write_jsonl
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from transformers import BartConfig, BartForConditionalGeneration

import prepare_easy_vqa
import reproduce_vl_bart as subject
import vl_bart_data as data
from dora_peft import DoraConfig
from reproduce_common import Options
from vl_bart_model import VlBartForConditionalGeneration, build_vl_bart, random_batch

CPU = torch.device("cpu")
CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("vl_bart_*.yaml"))


@pytest.fixture
def model():
    return build_vl_bart("toy").eval()


@pytest.fixture
def batch(model):
    torch.manual_seed(1)
    return random_batch(model.config, 3, 6, 4, CPU)


# ---- the model


def test_saved_and_loaded(model, batch, tmp_path):
    model.save_pretrained(tmp_path)
    again = VlBartForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert again.config.model_type == "vl_bart"
    assert again.config.visual_dim == 12
    assert torch.equal(model(**batch).logits, again(**batch).logits)


def test_the_picture_and_its_order_matter(model, batch):
    logits = model(**batch).logits
    other = batch | {"visual_features": batch["visual_features"].flip(1)}
    assert not torch.allclose(logits, model(**other).logits)
    assert not torch.allclose(
        logits, model(**batch | {"visual_features": torch.zeros_like(other["visual_features"])}).logits
    )


def test_padding_of_the_question_does_not_matter(model, batch):
    longer = dict(batch)
    longer["input_ids"] = torch.cat([batch["input_ids"], torch.full((3, 2), model.config.pad_token_id)], 1)
    longer["attention_mask"] = torch.cat([batch["attention_mask"], torch.zeros(3, 2, dtype=torch.int64)], 1)
    torch.testing.assert_close(model(**longer).logits, model(**batch).logits)


def test_generation_writes_what_the_logits_prefer(model, batch):
    inputs = {name: batch[name] for name in ("visual_features", "input_ids", "attention_mask")}
    found = model.generate(
        **inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False, num_beams=1, forced_eos_token_id=None
    )
    logits = model(**inputs, decoder_input_ids=found[:, :-1]).logits
    logits[..., model.config.eos_token_id] = -torch.inf
    assert torch.equal(logits.argmax(-1)[:, :4], found[:, 1:5])


def test_around_a_pretrained_bart(batch, tmp_path):
    shape = {"d_model": 32, "vocab_size": 64}
    for side in ("encoder", "decoder"):
        shape |= {f"{side}_layers": 1, f"{side}_attention_heads": 2, f"{side}_ffn_dim": 64}
    bart = BartForConditionalGeneration(BartConfig(**shape)).eval()
    bart.save_pretrained(tmp_path)
    model = VlBartForConditionalGeneration.from_bart(str(tmp_path), 12, 36).eval()
    text = {name: tensor for name, tensor in batch.items() if name != "visual_features"}
    assert torch.equal(model(**text).logits, bart(**text).logits)
    assert model(**batch).logits.shape == bart(**text).logits.shape


def test_adapters_on_the_attention(model, batch):
    adapted = get_peft_model(model, DoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    adapted(**batch).loss.backward()
    gradients = {name: p.grad for name, p in adapted.named_parameters() if p.requires_grad}
    # q and v of the encoder's, the decoder's and the cross attention
    assert sum("lora_B" in name for name in gradients) == 6
    assert all(g is not None and g.abs().sum() > 0 for name, g in gradients.items() if "lora_A" not in name)


def test_features_of_another_width(model, batch):
    with pytest.raises(ValueError, match=r"at most 36 tokens of 12 features, found the shape \[3, 36, 13\]"):
        model(**batch | {"visual_features": torch.zeros(3, 36, 13)})
    with pytest.raises(ValueError, match="expected input_ids"):
        model(visual_features=batch["visual_features"])


# ---- data


RECORDS = [
    {"picture": 0, "question": "what color is it?", "answer": "red"},
    {"picture": 1, "question": "what color is it?", "answer": "blue"},
    {"picture": 1, "question": "what color is it?", "answer": "blue"},
    {"picture": 2, "question": "is it a circle?", "answer": "yes"},
]


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


def test_question_only():
    test = [*RECORDS[:3], {"picture": 0, "question": "new?", "answer": "blue"}]
    assert data.question_only(RECORDS, test) == 3 / 4  # blue, and blue for what was never asked


def test_batches():
    tokenizer = data.word_tokenizer(RECORDS)
    part = data.Part(torch.arange(3 * 4 * 5, dtype=torch.uint8).view(3, 4, 5), RECORDS)
    batch = data.make_batch(part, [RECORDS[3], RECORDS[0]], tokenizer)
    assert torch.equal(batch["visual_features"][1], part.features[0].float() / 127.5 - 1)
    assert tokenizer.decode(batch["labels"][0]).split() == ["yes", "</s>"]
    assert "<unk>" not in tokenizer.decode(batch["input_ids"][1])
    assert data.make_batch(part, RECORDS, tokenizer, blank=True)["visual_features"].abs().sum() == 0


def test_patches():
    pixels = torch.arange(16 * 24 * 3).view(16, 24, 3)
    patches = prepare_easy_vqa.patchify(pixels)
    assert patches.shape == (6, 192)
    assert torch.equal(patches[4].view(8, 8, 3), pixels[8:, 8:16])
    with pytest.raises(ValueError, match="found 12 x 16"):
        prepare_easy_vqa.patchify(torch.zeros(12, 16, 3))


def test_silhouettes():
    pixels = torch.full((24, 16, 3), 200)
    pixels[6:10, 3:5, 0] = 90  # one channel differs enough, on the border of the first patch
    pixels[20, 12] = 210  # too like the background
    found = prepare_easy_vqa.silhouettes(pixels)
    assert found.shape == (6, 256)
    expected = torch.zeros(32, 24)
    expected[4 + 6 : 4 + 10, 4 + 3 : 4 + 5] = 255
    for index, (row, column) in enumerate((row, column) for row in (0, 8, 16) for column in (0, 8)):
        window = expected[row : row + 16, column : column + 16]
        assert torch.equal(found[index].view(16, 16).float(), window)


def test_prepared_from_the_archive(tmp_path):
    import io

    from PIL import Image

    colours = [(255, 0, 0), (0, 0, 255)]
    with zipfile.ZipFile(tmp_path / "package.whl", "w") as archive:
        archive.writestr("easy_vqa/data/train/questions.json", json.dumps([["what?", "red", 0], ["what?", "blue", 1]]))
        for number, colour in enumerate(colours):
            buffer = io.BytesIO()
            Image.new("RGB", (16, 8), colour).save(buffer, "png")
            archive.writestr(f"easy_vqa/data/train/images/{number}.png", buffer.getvalue())
    with zipfile.ZipFile(tmp_path / "package.whl") as archive:
        prepare_easy_vqa.write_part(archive, "train", tmp_path)
    features = load_file(tmp_path / "train.safetensors")["features"]
    assert features.shape == (2, 2, 448)
    assert [tuple(f[0, 256:259].tolist()) for f in features] == colours
    assert data.load_part(tmp_path, "train", "").records[1] == {"picture": 1, "question": "what?", "answer": "blue"}


def test_bad_data(tmp_path):
    with pytest.raises(ValueError, match=r"train\.jsonl and .*train\.safetensors: no such file\. Run it\."):
        data.load_part(tmp_path, "train", "Run it.")
    save_file({"features": torch.zeros(2, 1, 1)}, tmp_path / "train.safetensors")
    write_jsonl(tmp_path / "train.jsonl", RECORDS)
    with pytest.raises(ValueError, match=r"train\.jsonl, line 4: expected picture below 2"):
        data.load_part(tmp_path, "train", "")


# ---- settings and the claim


def test_there_are_configs():
    assert [path.stem for path in CONFIGS] == ["vl_bart_easy_vqa", "vl_bart_image", "vl_bart_video"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configs(path):
    settings = subject.load_settings(path)
    head = path.read_text(encoding="utf-8").split("\n\n")[0]
    assert f"configs/{path.name}" in head
    assert settings.target_modules == ["q_proj", "v_proj"]
    if path.stem == "vl_bart_image":  # the paper's
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
    ],
)
def test_bad_settings(change, message, tmp_path):
    values = yaml.safe_load(CONFIGS[0].read_text(encoding="utf-8"))
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values | change), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        subject.load_settings(path)


def test_the_claim_at_toy_size(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path / "data/easy_vqa")
    options = Options(data=tmp_path / "data", results=tmp_path / "results", dry_run=True)
    subject.run(options, seeds=(0, 1))
    content = json.loads((tmp_path / "results/vl_bart_laptop.json").read_text(encoding="utf-8"))
    methods = content["summary"]["methods"]
    assert set(methods) == set(subject.METHODS)
    assert all(len(entry["accuracies"]) == 2 for entry in methods.values())
    assert (tmp_path / "results/vl_bart_laptop.png").stat().st_size > 10000
    # again: the backbone and every run are there
    subject.run(options, seeds=(0, 1))
    again = json.loads((tmp_path / "results/vl_bart_laptop.json").read_text(encoding="utf-8"))
    assert again["runs"] == content["runs"]
