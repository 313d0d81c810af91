"""`from_pretrained`, `save_pretrained` and `push_to_hub` by the mixin of the package huggingface_hub, in the format of `save_weights`.

That package is an extra and is imported by the calls that need it; a local folder is loaded without it.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from vqkit.models.transformer import TransformerVQ

PAPER = "https://arxiv.org/abs/2309.16354"


class Pretrained:
    """The conventions of the Hugging Face hub for a model class of ours; a base beside `nn.Module`."""

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        *,
        device: str = "cpu",
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        token: str | bool | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
    ) -> Self:
        """The model in a folder (an export, a checkpoint, or a run, of which the newest whole checkpoint), else in a hub repository.

        It comes in evaluation mode. The options but `device` are those of huggingface_hub and concern repositories alone.
        Raises FileNotFoundError where neither folder nor repository is found, ValueError for weights that are damaged, of another format
        or of another model, ImportError for a repository without the package huggingface_hub.
        """
        if Path(path).is_dir():
            model = _load(Path(path), device)
        elif not _may_be_repository(path):
            raise FileNotFoundError(f"{path} does not exist: must be a folder with weights, or a repository as in user/name")
        else:
            options = {"revision": revision, "cache_dir": cache_dir, "token": token, "map_location": device}
            model = _from_repository(f"{path}", force_download=force_download, local_files_only=local_files_only, **options)
        if not isinstance(model, cls):
            raise ValueError(f"{path} holds a {type(model).__name__}, expected a {cls.__name__}")
        return model

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write config.json, model.safetensors and, unless there is one, README.md with the facts of the model, into `folder`.

        `from_pretrained`, `vqkit.load` and the commands read it. Raises ImportError without the package huggingface_hub;
        `vqkit.models.save_weights` writes the first two without it.
        """
        _bridge()(self).save_pretrained(Path(folder))

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str = "Weights and configuration of a Transformer-VQ",
        private: bool | None = None,
        token: str | None = None,
        branch: str | None = None,
        create_pr: bool | None = None,
    ) -> str:
        """Upload what `save_pretrained` writes to the repository `repo_id`, made if absent, and return the address of the commit.

        The options are those of huggingface_hub. Raises its errors, and ImportError without that package.
        """
        options = {"private": private, "token": token, "branch": branch, "create_pr": create_pr}
        return f"{_bridge()(self).push_to_hub(repo_id, commit_message=commit_message, **options)}"


def model_card(model: TransformerVQ) -> str:
    """What a reader of the model's page wants to know, in Markdown, from the model alone."""
    from vqkit.models.cost import flops_per_token, state_bytes

    config = model.config
    parameters = sum(parameter.numel() for parameter in model.parameters())
    rows = [
        ("parameters", f"{parameters:,}"),
        ("layers, width, heads", f"{config.layers}, {config.dim}, {config.heads}"),
        ("codes per head", f"{config.codebook_size} of width {config.key_dim}"),
        ("block, window", f"{config.block_len}, {config.mem_len}"),
        ("vocabulary", f"{config.vocab_size}{' (bytes)' if config.vocab_size == 259 else ''}"),
        ("FLOPs per token, forward", f"{flops_per_token(config).forward:,}"),
        ("decoding state", f"{state_bytes(config):,} bytes, however long the text"),
    ]
    facts = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return (
        "# A Transformer-VQ\n\n"
        f"A decoder-only transformer with vector-quantized keys, linear in the length of the text ([Lingle, 2024]({PAPER})), for vqkit.\n\n"
        f"|  |  |\n|---|---|\n{facts}\n\n"
        '```python\nimport vqkit\n\nmodel = vqkit.TransformerVQ.from_pretrained("...")  # this repository, or a folder with its files\n'
        "logits = model(tokens).logits\n```\n"
    )


def _load(folder: Path, device: str) -> TransformerVQ:
    from vqkit.models.weights import find_and_load_weights

    return find_and_load_weights(folder, device)[1].eval()


def _may_be_repository(path: str | os.PathLike[str]) -> bool:
    """`name` or `user/name`; a path in any other form means a folder, and is not to be asked of a server."""
    parts = path.split("/") if isinstance(path, str) else []
    return 1 <= len(parts) <= 2 and all(part.strip(".") for part in parts) and "\\" not in f"{path}"


def _from_repository(repo_id: str, **options: Any) -> TransformerVQ:
    bridge = _bridge()
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return bridge.from_pretrained(repo_id, **options).network
    except (LocalEntryNotFoundError, HfHubHTTPError) as error:
        raise FileNotFoundError(f"{repo_id}: no folder of that name, and no such repository could be read: {error}") from error


@cache
def _bridge() -> Any:
    """The class between a model and huggingface_hub's mixin, which expects to be a base of what it saves and loads.

    A class of its own, so that defining the model imports no extra and the mixin's own attributes stay out of the model.
    """
    try:
        from huggingface_hub import ModelCard, ModelCardData, PyTorchModelHubMixin, hf_hub_download
    except ModuleNotFoundError as error:
        raise ImportError('the hub needs the package huggingface_hub: pip install "vqkit[hub]"') from error
    from vqkit.models.weights import CONFIG_FILE, WEIGHTS_FILE, save_weights

    class Bridge(PyTorchModelHubMixin, library_name="vqkit", paper_url=PAPER, tags=["transformer-vq", "vector-quantization"]):
        def __init__(self, network: TransformerVQ) -> None:  # not `model`: a key of config.json would be taken for it
            self.network = network

        def _save_pretrained(self, save_directory: Path) -> None:
            save_weights(self.network, self.network.config, save_directory)

        @classmethod
        def _from_pretrained(cls, *, model_id: str, map_location: str = "cpu", strict: bool = True, **options: Any) -> Bridge:
            folders = {Path(hf_hub_download(model_id, name, **options)).parent for name in (CONFIG_FILE, WEIGHTS_FILE)}
            return cls(_load(folders.pop(), map_location))

        def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
            data: ModelCardData = self._hub_mixin_info.model_card_data
            return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{model_card(self.network)}")

    return Bridge
