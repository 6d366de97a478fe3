"""Makes a drafter class an SGLang speculative algorithm: what SGLang asks of an algorithm, and the server's settings.

Runs in the launcher too, so nothing here loads weights; every mistake of the user's ends in one line.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from sglang.srt.managers.overlap_utils import FutureMap
from sglang.srt.model_executor.cuda_graph_config import Backend, Phase, with_phase
from sglang.srt.platforms import current_platform
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm
from sglang.srt.speculative.spec_registry import CustomSpecAlgo

from dspark_sgl.policies.errors import PolicyError
from dspark_sgl.policies.shape import most_nodes
from dspark_sgl.policies.shipped import find_policy
from dspark_sgl.spec_algos.protocol import Drafter

from .cpu_platform import CpuPlatform
from .draft_spelling import as_sglang_reads_it
from .drafts import DraftError, check_draft, find_draft, read_draft_config
from .settings import policy_name
from .unserved import refuse_settings, refuse_target

logger = logging.getLogger(__name__)

DEFAULT_NODES = 15
"""For drafters without a checkpoint to say: the KV reserved for a tree."""


def register(drafter: type[Drafter]) -> None:
    """Register `drafter` with SGLang under `drafter.algorithm`."""

    class Algorithm(DrafterAlgorithm):
        drafter_class = drafter

    def worker_class(server_args: Any) -> type:
        from .worker import SpecWorker

        return type(f"{drafter.__name__}Worker", (SpecWorker,), {"drafter_class": drafter})

    SpeculativeAlgorithm.register(drafter.algorithm, supports_overlap=drafter.on_device, spec_class=Algorithm)(
        worker_class
    )


def is_ours(algorithm: str | None) -> bool:
    """Whether a server's `--speculative-algorithm` is one that was registered here."""
    return algorithm is not None and isinstance(SpeculativeAlgorithm.from_string(algorithm), DrafterAlgorithm)


class DrafterAlgorithm(CustomSpecAlgo):
    """One registered algorithm. The queries are SGLang's; what they decide is said beside each."""

    drafter_class: type[Drafter]

    def is_dflash_family(self) -> bool:
        """Capture the target layers that the draft's config names; size the draft's KV pool beside the target's."""
        return self.drafter_class.uses_target_hidden and not self.drafter_class.recurrent

    def is_eagle(self) -> bool:
        """Size the draft's KV pool beside the target's, and match prefixes in the radix cache by pairs of tokens."""
        return self.drafter_class.recurrent

    def is_eagle3(self) -> bool:
        """Capture the target layers that the draft's `eagle_config` names."""
        return self.drafter_class.recurrent and not self.drafter_class.final_hidden

    def supports_target_verify_for_draft(self) -> bool:
        """The draft block itself runs as a verify-shaped forward."""
        return self.is_dflash_family()

    def has_draft_kv(self) -> bool:
        return self.drafter_class.uses_target_hidden

    def carries_draft_hidden_states(self) -> bool:
        return False

    def need_topk(self) -> bool:
        return False

    def get_platform_worker_cls(self) -> None:
        return None

    def create_future_map(
        self, device: Any, req_to_token_pool: Any, needs_cpu_seq_lens: bool = True, needs_confidence_relay: bool = False
    ) -> FutureMap:
        # The policy and the plans of attention read lengths on the host, whatever the backend.
        return FutureMap(device, self, req_to_token_pool, True, needs_confidence_relay)

    def handle_server_args(self, server_args: Any) -> None:
        """Fill in what speculation needs, and end the launch with one line where it cannot work."""
        try:
            self._configure(server_args)
        except (PolicyError, DraftError) as error:
            raise SystemExit(f"error: {error}") from None

    def _configure(self, args: Any) -> None:
        refuse_settings(args, self.name)
        on_gpu = not isinstance(current_platform, CpuPlatform)
        refuse_target(_config_folder(args.model_path, args.revision), self.name, on_gpu)
        if args.speculative_num_steps is not None and args.speculative_num_steps < 1:
            raise DraftError("--speculative-num-steps must be at least 1; for plain decoding use --dspark-policy off")
        if on_gpu:
            _use_flashinfer(args, self.name)
            # SGLang's autotuner runs a verify forward, for which it knows the inputs of drafters with a model only.
            args.disable_flashinfer_autotune |= not self.drafter_class.uses_target_hidden
        policy = find_policy(policy_name())
        if not on_gpu or not self.supports_overlap:
            args.disable_overlap_schedule = True
        # The graphs of a round are ours (graphs.py), and so this says only whether the user wants any.
        args.disable_decode_cuda_graph = args.cuda_graph_config.decode.backend == Backend.DISABLED
        args.cuda_graph_config = with_phase(args.cuda_graph_config, Phase.DECODE, backend=Backend.DISABLED)
        args.enable_mixed_chunk = False
        args.enable_metrics = True  # a policy that nobody can watch is not one to trust
        args.speculative_eagle_topk = 1
        block = args.speculative_num_steps
        if self.drafter_class.uses_target_hidden:
            draft = self._draft(args)
            args.speculative_draft_model_path = str(draft)
            args.speculative_draft_model_revision = None
            if self.drafter_class.recurrent:
                # One step after another: any depth will do, and each step has the slot of its own position.
                trained = block = block or self.drafter_class.default_depth
            else:
                trained = read_draft_config(draft).gamma
                block = min(block or trained, trained)
            # The block pass needs a slot for every row it was trained with, however few are verified; a tree one for
            # every node. More may be asked for, by whoever means to switch to larger trees on the running server.
            nodes = most_nodes(policy) if self.drafter_class.trees else 0
            asked = args.speculative_num_draft_tokens or 0
            args.speculative_num_draft_tokens = max(asked, trained + 1, nodes + 1)
        else:
            block = block or self.drafter_class.default_depth
            args.speculative_num_draft_tokens = max(args.speculative_num_draft_tokens or DEFAULT_NODES + 1, block + 1)
        args.speculative_num_steps = block

    def _draft(self, args: Any) -> Path:
        """The draft checkpoint: the one named, or the one shipped or cached for this target."""
        target = _local(args.model_path, args.revision)
        named = args.speculative_draft_model_path
        path = find_draft(target, self.name) if named is None else _local(named, args.speculative_draft_model_revision)
        if path is None:
            raise DraftError(
                f"no draft for {self.name} is shipped or cached for {target}; name one with "
                "--speculative-draft-model-path, or train one (recipes/README.md in the source checkout)"
            )
        check_draft(path, target, self.name)
        return Path(path) if self.drafter_class.recurrent else as_sglang_reads_it(Path(path))


def _use_flashinfer(args: Any, algorithm: str) -> None:
    """The one attention backend for a GPU that takes a mask of our own making, in graphs and out of them."""
    others = {args.attention_backend, args.prefill_attention_backend, args.decode_attention_backend}
    if others - {None, "flashinfer"}:
        # By now SGLang has put its own choice for this GPU where the user made none, and both look alike.
        logger.info("%s: attention runs on FlashInfer, which takes the masks of its trees", algorithm)
    args.attention_backend = "flashinfer"
    args.prefill_attention_backend = args.decode_attention_backend = args.speculative_draft_attention_backend = None


def _config_folder(name: str, revision: str | None) -> Path:
    """Where the target's config.json is; where it cannot be had, SGLang says so."""
    path = Path(name)
    if not _is_of_a_hub(name):
        return path
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, "config.json", revision=revision)).parent
    except Exception:  # as below
        return path


def _is_of_a_hub(name: str) -> bool:
    return not (Path(name).exists() or name.startswith(("/", ".")) or name.count("/") != 1)


def _local(name: str, revision: str | None) -> Path:
    """The folder of a checkpoint; one named as on a hub is downloaded, as SGLang itself would."""
    if not _is_of_a_hub(name):
        return Path(name)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision))
    except Exception as error:  # offline, gated, unknown: the library has many classes for it
        reason = str(error).splitlines()[0]
        raise DraftError(f"{name} is no folder here and cannot be downloaded: {reason}") from None
