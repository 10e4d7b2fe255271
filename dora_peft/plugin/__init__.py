"""Where PEFT, transformers, accelerate and torch are touched; every patch and hook is in this list, with its reason.

Written against PEFT 0.20.0 to 0.21.2 and transformers 5.23. A patch acts on DoRA models and on marked folders only, and
passes everything else on.

What `register`, called when the package is imported, installs:

    peft.PeftType                   has no hook for another type: a member is added to the enum, as transformers reads
                                    its `.value` (peft_type.py)
    PEFT_TYPE_TO_..._MAPPING        PEFT's own registry of configs, tuners and prefixes
    peft.helpers.LoraLayer          `rescale_adapter_scale` looks for this class alone
    PeftConfigMixin                 (configs.py)
      ._get_peft_type               a folder of ours says `peft_type: LORA`, so that plain PEFT reads it; PEFT picks the
      .from_peft_type               config class by that entry. Both see the mark in auto_mapping
      .from_pretrained              "Can't find 'adapter_config.json'" does not say what is there instead
      .from_json_file               an error of the JSON parser does not name the file
    PeftModel                       (models.py)
      .__init__                     leaves a half-adapted model behind an error or Ctrl-C
      .load_adapter                 the same; an error about shapes does not name the adapter; and PEFT's own use_dora
                                    folders are taken as DoRA by a DoRA model
      .from_pretrained              leaves a half-loaded adapter behind
      .add_adapter                  the same; and it refuses another kind of adapter without saying what to do
      .set_adapter                  changes its active adapter before those of the layers, which may fail
      .save_pretrained              writes its files in place: they go to a temporary directory first, and the model
                                    card is completed
      ._upload_modified_files       transformers' push_to_hub overwrites that card with a generic one: it is made again
    peft.utils.hotswap              its functions know PEFT's LoRA layers alone (hotswap.py)
    create_loraplus_optimizer,      know A and B alone, and treat m as B or as A (optimizers.py)
    create_lorafa_optimizer
    convert_to_lora,                write a config that leaves out magnitude-only modules and layer_replication, and do
    _convert_module_to_lora         not say who reads its patterns (conversion.py)
    PeftMixedModel's check          lists the kinds it takes, without a reason (mixed.py)
    load_peft_weights, torch_load   safetensors' and torch's errors about a damaged file name neither file nor cure
                                    (models.py)
    PeftAdapterMixin                (transformers.py)
      .load_adapter                 reads the file by itself: the checks and conversions of a checkpoint follow it
      .add_adapter, .set_adapter,   leave a half-changed model behind an error or Ctrl-C
      .delete_adapter
    get_, set_peft_model_state_dict in PEFT 0.20, which has no methods of a tuner for the state dict (peft_020.py)
    warnings                        PEFT to 0.21.2 reads a property that transformers 5.23 renamed, which every model
                                    with an adapter would warn of. The last filter of all: one that a user sets wins
    accelerate.hooks                `add_hook_to_module` puts a module's tensors on the meta device between calls, and
                                    brings them in around the module's forward pass. An adapter's tensors are read
                                    without one, so they stay (bases/offload.py)

What importing the package installs without `register`:

    torch.optim, step pre-hook      warns once per optimizer that decays magnitudes (optim.py); of all optimizers, as
                                    nothing else sees one that a trainer made
    torch.library                   `dora_peft::weight_norm` (norms/operators.py), and once kernels compile
                                    `dora_peft::linear` and `linear_backward` (ops/kernels/operators.py)

And only while `accelerate_use_dora` is on: `forward` of PEFT's LoRA layers and of its DoRA variants (use_dora.py); for
the length of a call with `adapter_names`: forward pre-hooks on the adapted layers (adapters/mixed_batch.py).
"""

from __future__ import annotations

import warnings

import accelerate.hooks
import peft.helpers
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTuner

from ..bases.offload import staying_add_hook
from ..config import DoraConfig
from ..layers import DoraLayer
from ..model import DoraModel
from . import configs, conversion, hotswap, mixed, models, optimizers, peft_020, transformers
from .patching import patch
from .peft_type import add_peft_type


def register() -> None:
    """Enter DoRA into PEFT's registry and install the patches; calling it twice changes nothing.

    Raises:
        ImportError: Another package has taken `PeftType.DORA`.
    """
    dora = add_peft_type()
    known = PEFT_TYPE_TO_CONFIG_MAPPING.get(dora)
    if known is not None and known.__module__ != DoraConfig.__module__:
        raise ImportError(
            f"PeftType.DORA is already taken by {known.__module__}.{known.__name__}. Import one of the two packages "
            "only."
        )
    PEFT_TYPE_TO_CONFIG_MAPPING[dora] = DoraConfig
    PEFT_TYPE_TO_TUNER_MAPPING[dora] = DoraModel
    PEFT_TYPE_TO_PREFIX_MAPPING[dora] = DoraModel.prefix
    peft.helpers.LoraLayer = (LoraLayer, DoraLayer)  # type: ignore[assignment, misc]
    configs.install()
    models.install()
    transformers.install()
    hotswap.install()
    conversion.install()
    mixed.install()
    optimizers.install()
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning, append=True)
    patch(accelerate.hooks, "add_hook_to_module", staying_add_hook)
    if not hasattr(BaseTuner, "_get_adapter_state_dict"):
        peft_020.install()
