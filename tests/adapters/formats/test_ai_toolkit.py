"""ai-toolkit: s lies in B, and a pipeline's part before the paths."""

import pytest
import torch
from format_fixtures import adapter, base_for

from dora_peft.adapters.formats import FORMATS, Adapter, Base, Source, UnreadableError, read_source, write_files

FORMAT = FORMATS["ai-toolkit"]


def test_s_is_folded_into_b():
    made = adapter(5, 3, 2.0)
    tensors = FORMAT.write(made, None).tensors
    for path, one in made.modules.items():
        torch.testing.assert_close(tensors[f"{path}.lora_B.weight"], one.lora_B * 2 / 3)
        assert torch.equal(tensors[f"{path}.lora_A.weight"], one.lora_A)
    assert {key.rpartition(".")[2] for key in tensors} == {"weight", "magnitude"}


@pytest.mark.parametrize("prefix", ["diffusion_model.", "transformer."])
def test_parts_of_a_pipeline_are_taken_off(tmp_path, prefix):
    made = adapter(5, 3, 2.0)
    base = Base(base_for(made))
    files = FORMAT.write(Adapter({f"{prefix}{path}": one for path, one in made.modules.items()}), base)
    write_files(files, tmp_path / "a.safetensors")
    source = read_source(tmp_path / "a.safetensors")
    assert FORMAT.read(source, base).modules.keys() == made.modules.keys()
    # GPT-2's own paths begin so: nothing says that it is a pipeline's
    without = FORMAT.read(source, None).modules
    assert (without.keys() == made.modules.keys()) is (prefix == "diffusion_model.")


def test_other_keys():
    source = Source("adapter", {**FORMAT.write(adapter(5, 3, 2.0), None).tensors, "a.alpha": torch.ones(())})
    with pytest.raises(UnreadableError, match=r"'a\.alpha' is no key of this format"):
        FORMAT.read(source, None)
