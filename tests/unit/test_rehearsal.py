"""`job=rehearse`: the toy is as planned in every layout, and bugs that are planted in the real code are found."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from checkpoints import make_layout
from PIL import Image
from torch import Tensor

from cosmos3_pipeline import compose
from cosmos3_pipeline.checkpoint.inspect import CheckpointInfo
from cosmos3_pipeline.config.shortcut import composition_of
from cosmos3_pipeline.denoise import ParallelLoopDenoiser
from cosmos3_pipeline.denoise.exchange import Exchange
from cosmos3_pipeline.denoise.transformer import ParallelTransformer
from cosmos3_pipeline.distributed.comm import Comm, Pending, Region
from cosmos3_pipeline.errors import ConfigError
from cosmos3_pipeline.jobs.rehearse import RehearsalFailed, rehearse
from cosmos3_pipeline.jobs.rehearse.rank import rehearse_ranks
from cosmos3_pipeline.jobs.start import prepare
from cosmos3_pipeline.models import loading, reading
from cosmos3_pipeline.models.placement import PlacedTransformer
from cosmos3_pipeline.models.tokenizer import load_tokenizer
from cosmos3_pipeline.planning.hardware import accelerator_of
from cosmos3_pipeline.rehearsal.findings import Rehearsed
from cosmos3_pipeline.rehearsal.messages import RehearsedComm
from cosmos3_pipeline.rehearsal.roofline import Work, by_kind
from cosmos3_pipeline.rehearsal.tracker import ACCELERATOR, NotRehearsed, Tracker, rehearsing
from cosmos3_pipeline.stages.context import RunContext
from cosmos3_pipeline.stages.decode import DecodeStage
from cosmos3_pipeline.vae import bound_ops
from cosmos3_pipeline.vae.parallel_vae import ParallelVAE

SHORT = "sampler.steps=4"


def rehearsed(*overrides: str, ranks: Sequence[int] | None = None) -> Rehearsed:
    return rehearse_ranks(compose([SHORT, *overrides]), ranks)


def kinds(found: Rehearsed) -> set[str]:
    return {finding.kind for finding in found.findings}


LAYOUTS = [
    ("topology=cpu_x1",),
    ("topology=cpu_x4", "vae/decode=layer_pipeline"),
    ("topology=cpu_x4", "vae/decode=spatial_shard"),
    ("topology=cpu_x4", "vae=replicated"),
    ("topology=cpu_x1", "weights=streamed"),
    ("topology=cpu_x4", "weights=sharded"),
    ("topology=h100_x1", "model.dtype=bfloat16", "model.vae_dtype=bfloat16"),
    ("topology=cpu_x1", "task=t2i"),
    ("topology=cpu_x4", "topology.cfg=1", "topology.ulysses=1", "topology.cp=[2,2]", "vae=replicated"),
    ("topology=cpu_x4", "topology.cfg=1", "topology.cp=[1,2]", "vae=replicated", "model.dtype=bfloat16"),
]


@pytest.mark.sampled(1)
@pytest.mark.long
@pytest.mark.parametrize("overrides", LAYOUTS, ids=" ".join)
def test_the_toy_is_as_planned(overrides: tuple[str, ...]) -> None:
    found = rehearsed(*overrides)
    assert found.findings == ()
    assert sorted(rank for alike in found.alike.values() for rank in alike) == list(range(len(found.plan.ranks)))
    for rank in found.ranks:
        assert rank.stages.keys() == found.plan.ranks[rank.rank].stages.keys()
        for name, stage in rank.stages.items():
            planned = found.plan.ranks[rank.rank].stages[name]
            # A plan may be higher: of a line whose cuts move it knows two short clips and what a chunk adds.
            assert 0.9 < stage.peak_bytes / planned.peak_bytes < 1.05
            assert (stage.sent_bytes, stage.sent_messages) == (planned.sent.bytes, planned.sent.messages)
            assert stage.kernels > 0
            assert stage.holders


@pytest.mark.long
def test_ranks_with_a_single_op_are_as_planned() -> None:
    """Nothing hides a wrong count there: weights loaded, latents, messages in flight, dropped outputs.

    Of the toy's 84 ranks those of the first op, a convolution onto a shortcut in small and in large pictures, the
    begin of a shortcut, and an upsampling.
    """
    chosen = ["topology=cpu_x2", "topology.ulysses=1", "topology.cfg=1", "topology.ranks_per_node=84"]
    found = rehearsed(*chosen, "vae/decode=layer_pipeline", "task.num_frames=33", ranks=[83, 65, 24, 23, 35])
    assert not [finding for finding in found.findings if finding.kind != "messages"]
    for rank in found.ranks:
        planned, counted = found.plan.ranks[rank.rank].stages["decode"], rank.stages["decode"]
        (start, stop) = planned.share["ops"]
        assert stop - start == 1
        assert counted.flops == planned.flops
        assert counted.peak_bytes == pytest.approx(planned.peak_bytes, rel=0.02)


def test_a_condition_is_encoded_from_the_real_photograph(tmp_path: Path) -> None:
    Image.new("RGB", (160, 96), "red").save(tmp_path / "photo.png")
    found = rehearsed("task=i2v", f"task.image={tmp_path / 'photo.png'}")
    assert "encode" in found.ranks[0].stages
    assert found.findings == ()


@pytest.mark.thorough
@pytest.mark.long
def test_steps_that_are_alike_are_run_once() -> None:
    few, many = (rehearsed(f"sampler.steps={steps}").ranks[0].stages["denoise"] for steps in (4, 40))
    assert many.kernels / few.kernels == pytest.approx(10, rel=0.05)
    assert many.peak_bytes == few.peak_bytes


@pytest.mark.thorough
@pytest.mark.long
def test_ranks_can_be_chosen() -> None:
    found = rehearsed("topology=cpu_x4", ranks=[0, 3])
    assert [rank.rank for rank in found.ranks] == [0, 3]
    assert found.findings == ()


@pytest.fixture
def prompt_file(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.txt"
    file.write_text("a red kite\na small blue circle moves over a green field\nrain\n")
    return file


@pytest.mark.sampled(1)
@pytest.mark.long
@pytest.mark.parametrize("weights", ["resident", "sharded", "streamed"])
def test_two_clips_of_a_prompt_file_are_as_planned(weights: str, prompt_file: Path) -> None:
    found = rehearsed("topology=cpu_x2", f"weights={weights}", f"task.prompt_file={prompt_file}")
    assert found.findings == ()
    assert found.plan.clips == 3
    for rank in found.ranks:
        assert rank.second_clip.keys() == {"denoise", "decode"}
        # The decoder's weights are there from the first clip on.
        more = rank.second_clip["denoise"].peak_bytes - rank.stages["denoise"].peak_bytes
        assert more > 0.9 * found.plan.ranks[rank.rank].weight_bytes["vae"]
    assert any("2 of the 3 clips" in note for note in found.notes)


@pytest.mark.thorough
@pytest.mark.long
def test_what_the_first_clip_leaves_is_found_in_the_second(
    prompt_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[Tensor] = []
    assemble = ParallelTransformer.assemble

    def keeps(self: ParallelTransformer, prepared: Any, gathered: Tensor, latents: Any) -> Any:
        kept.append(gathered.repeat(10))
        return assemble(self, prepared, gathered, latents)

    monkeypatch.setattr(ParallelTransformer, "assemble", keeps)
    found = rehearsed(f"task.prompt_file={prompt_file}")
    assert ("memory", "denoise, second clip") in {(f.kind, f.stage) for f in found.findings}


@pytest.mark.long
def test_streamed_layers_wait_in_pinned_memory_and_are_copied() -> None:
    found = rehearsed("weights=streamed", "weights.resident_layers=0", "topology=h200_x1")
    (rank,), planned = found.ranks, found.plan.ranks[0]
    assert rank.pinned_bytes == planned.host_bytes > 0
    brought = planned.stages["denoise"].seconds["weights"] * found.plan.accelerator.host_bytes_per_s
    # A layer comes before the first step, and a few numbers of the schedule with every one.
    assert rank.stages["denoise"].copied_bytes == pytest.approx(brought, rel=0.2)


@pytest.mark.thorough
@pytest.mark.long
def test_pinned_memory_that_is_not_planned_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PlacedTransformer, "_pinned", pinned_twice(PlacedTransformer._pinned))
    found = rehearsed("weights=streamed", "weights.resident_layers=0")
    assert "host" in kinds(found)


def pinned_twice(pinned: Callable[..., Tensor]) -> Callable[..., Tensor]:
    kept = []

    def twice(self: PlacedTransformer, files: Any, number: int) -> Tensor:
        kept.append(pinned(self, files, number))
        return pinned(self, files, number)

    return twice


@pytest.mark.thorough
@pytest.mark.long
def test_a_checkpoint_that_is_here_is_rehearsed_with_its_own_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_layout(tmp_path / "edge", "edge")
    used: list[Path] = []

    def loaded(info: CheckpointInfo) -> Any:
        used.append(info.folder)
        return load_tokenizer(info)

    monkeypatch.setattr(loading, "load_tokenizer", loaded)
    monkeypatch.setattr(reading, "_fill", lambda *args: pytest.fail("a weight was read"))
    found = rehearsed("model=edge", f"model.path={folder}", "task=t2i", "task.height=96", "task.width=96")
    assert found.findings == ()
    assert set(used) == {folder}
    assert not any("tokenizer" in note for note in found.notes)


# ------------------------------------------------------------ planted bugs
@pytest.mark.long
def test_a_wait_in_every_step_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = ParallelTransformer.hidden

    def reads(self: ParallelTransformer, passes: Any, embedded: Sequence[Tensor]) -> Iterator[Tensor]:
        embedded[0].sum().item()
        return layers(self, passes, embedded)

    monkeypatch.setattr(ParallelTransformer, "hidden", reads)
    (finding,) = rehearsed().findings
    assert finding.kind == "wait"
    assert "embedded[0].sum().item()" in finding.text


@pytest.mark.thorough
@pytest.mark.long
def test_a_wait_in_every_chunk_is_found_also_where_no_frame_comes_out(monkeypatch: pytest.MonkeyPatch) -> None:
    run = bound_ops.TimeUp.run

    def reads(self: bound_ops.TimeUp, flow: bound_ops.Flow) -> None:
        flow.at.inner.mean().cpu()
        run(self, flow)

    monkeypatch.setattr(bound_ops.TimeUp, "run", reads)
    found = rehearsed("topology=cpu_x4")
    assert kinds(found) == {"wait"}
    assert {finding.stage for finding in found.findings} == {"decode"}
    assert {finding.rank for finding in found.findings} - {0}


def changed_exchange(change: Callable[[Comm, list[Region], list[Region]], None]) -> Any:
    exchange = Comm.exchange

    def changed(self: Comm, sends: Sequence[Region] = (), receives: Sequence[Region] = ()) -> Pending:
        given, wanted = list(sends), list(receives)
        change(self, given, wanted)
        return exchange(self, given, wanted)

    return changed


@pytest.mark.thorough
@pytest.mark.long
def test_a_message_one_element_short_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def shorten(comm: Comm, sends: list[Region], receives: list[Region]) -> None:
        if sends and comm.rank == 1:
            tensor, peer = sends[0]
            sends[0] = tensor.reshape(-1)[:-1], peer

    monkeypatch.setattr(Comm, "exchange", changed_exchange(shorten))
    found = rehearsed("topology=cpu_x2")
    assert kinds(found) == {"bytes", "messages"}
    assert any("which receives" in finding.text for finding in found.findings)


@pytest.mark.thorough
@pytest.mark.long
def test_a_halo_one_row_short_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def shorten(comm: Comm, sends: list[Region], receives: list[Region]) -> None:
        # Activations have five dimensions; the rows are the third.
        for regions in (sends, receives):
            regions[:] = [(t[:, :, :-1] if t.ndim == 5 and t.shape[2] > 1 else t, peer) for t, peer in regions]

    monkeypatch.setattr(Comm, "exchange", changed_exchange(shorten))
    found = rehearsed("topology=cpu_x2", "vae/decode=spatial_shard", "vae.parallel_decode=true")
    assert "bytes" in kinds(found)


@pytest.mark.long
def test_a_message_that_nobody_receives_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    gather = Exchange.gather_rows

    def sends_more(self: Exchange, own: Tensor, rows: Sequence[int]) -> Tensor:
        if self.ranks > 1 and self.rank == 0:
            assert self._comm is not None
            self._comm.exchange(sends=[(own, 1)]).wait()
        return gather(self, own, rows)

    monkeypatch.setattr(Exchange, "gather_rows", sends_more)
    found = rehearsed("topology=cpu_x2")
    assert kinds(found) == {"bytes", "messages"}
    assert any("nobody receives" in finding.text for finding in found.findings)


@pytest.mark.thorough
@pytest.mark.long
def test_a_message_that_nobody_sends_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def waits_for_more(comm: Comm, sends: list[Region], receives: list[Region]) -> None:
        if comm.rank == 1:
            receives += [(torch.empty_like(tensor), peer) for tensor, peer in receives[:1]]

    monkeypatch.setattr(Comm, "exchange", changed_exchange(waits_for_more))
    found = rehearsed("topology=cpu_x2")
    assert any(f.kind == "messages" and f.rank is None for f in found.findings)


@pytest.mark.long
def test_collectives_in_another_order_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    gather = Exchange.gather_rows

    def collectives(self: Exchange, own: Tensor, rows: Sequence[int]) -> Tensor:
        if self.ranks > 1:
            assert self._comm is not None
            calls = [lambda: self._comm.all_gather(own), lambda: self._comm.broadcast(own.contiguous())]
            for call in calls if self.rank == 0 else reversed(calls):
                call()
        return gather(self, own, rows)

    monkeypatch.setattr(Exchange, "gather_rows", collectives)
    found = rehearsed("topology=cpu_x2")
    assert any("another order" in finding.text for finding in found.findings)


def planted_in_gather(extra: Callable[[Comm, Tensor], object]) -> Any:
    """`Exchange.gather_rows`, of every step, which does `extra` with 8 elements before its own work."""
    gather = Exchange.gather_rows

    def planted(self: Exchange, own: Tensor, rows: Sequence[int]) -> Tensor:
        if self.ranks > 1:
            assert self._comm is not None
            extra(self._comm, own.new_empty(8))
        return gather(self, own, rows)

    return planted


def faults(found: Rehearsed) -> list[str]:
    """The findings about the messages of all ranks together."""
    return [finding.text for finding in found.findings if finding.kind == "messages" and finding.rank is None]


ULYSSES = ("topology=cpu_x4", "topology.cfg=1", "topology.ulysses=4", "task.num_frames=5", "vae=replicated")


@pytest.mark.long
def test_a_deadlock_across_pairs_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def in_a_ring(comm: Comm, some: Tensor) -> None:
        before, after = (comm.rank - 1) % comm.size, (comm.rank + 1) % comm.size
        comm.exchange(receives=[(some.clone(), before)]).wait()
        comm.exchange(sends=[(some, after)]).wait()

    monkeypatch.setattr(Exchange, "gather_rows", planted_in_gather(in_a_ring))
    (fault,) = faults(rehearsed(*ULYSSES))
    assert "a deadlock: rank 0 waits at" in fault
    assert all(f"rank {rank} to send" in fault for rank in range(4))
    assert "comm.exchange(receives=[(some.clone(), before)]).wait()" in fault


@pytest.mark.thorough
@pytest.mark.long
def test_a_message_that_nobody_waits_for_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def in_a_ring(comm: Comm, some: Tensor) -> None:
        before, after = (comm.rank - 1) % comm.size, (comm.rank + 1) % comm.size
        comm.exchange(sends=[(some, after)], receives=[(some.clone(), before)])

    monkeypatch.setattr(Exchange, "gather_rows", planted_in_gather(in_a_ring))
    found = faults(rehearsed(*ULYSSES))
    assert len(found) == 4
    assert all(f"rank {rank} never waits for the" in fault for rank, fault in enumerate(found))


@pytest.mark.sampled(2)
@pytest.mark.long
@pytest.mark.parametrize("way", ["tensor", "to", "mask", "event", "cache"])
def test_waits_that_only_a_gpu_makes_are_found(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies from the host that block, masks that are written through, events, memory that is given back."""
    step = ParallelLoopDenoiser.__call__

    def waits(self: Any, components: Any, block_state: Any, *args: Any, **kwargs: Any) -> Any:
        some = torch.empty(4, 4, device=block_state.vision_tokens[0].device)
        if way == "tensor":
            torch.tensor([1.0, 2.0], device=some.device)
        elif way == "to":
            torch.ones(4, 1).to(some.device)
        elif way == "mask":
            some[some.sum(1) > 0] = some[:1]
        elif way == "event":
            torch.cuda.current_stream().record_event().synchronize()
        else:
            torch.cuda.empty_cache()
        return step(self, components, block_state, *args, **kwargs)

    monkeypatch.setattr(ParallelLoopDenoiser, "__call__", waits)
    found = rehearsed("sampler.steps=4").findings
    assert any("the host waits for the accelerator in every step" in finding.text for finding in found)


@pytest.mark.thorough
@pytest.mark.long
def test_the_same_ring_in_batches_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def in_a_ring(comm: Comm, some: Tensor) -> None:
        before, after = (comm.rank - 1) % comm.size, (comm.rank + 1) % comm.size
        comm.exchange(sends=[(some, after)], receives=[(some.clone(), before)]).wait()

    monkeypatch.setattr(Exchange, "gather_rows", planted_in_gather(in_a_ring))
    assert not faults(rehearsed(*ULYSSES))


@pytest.mark.thorough
@pytest.mark.long
def test_a_rank_that_asks_two_groups_in_another_order_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    made: dict[int, list[Comm]] = {}

    def of_two(comm: Comm, some: Tensor) -> None:
        assert isinstance(comm, RehearsedComm)
        log, members = comm._log, (0, 1)
        groups = made.setdefault(comm.rank, [])
        if not groups:
            for name in ("first", "second"):
                log.members[name] = members
                groups.append(RehearsedComm(name, comm.rank, members, log))
        for group in groups if comm.rank == 0 else reversed(groups):
            group.all_gather(some)

    monkeypatch.setattr(Exchange, "gather_rows", planted_in_gather(of_two))
    (fault,) = faults(rehearsed("topology=cpu_x2", "topology.cfg=1", "topology.ulysses=2", "vae=replicated"))
    assert "a deadlock" in fault
    assert "all_gather" in fault
    assert "[first]" in fault
    assert "[second]" in fault


@pytest.mark.thorough
@pytest.mark.long
def test_a_message_of_another_dtype_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def sends(comm: Comm, some: Tensor) -> None:
        if comm.rank == 0:
            comm.exchange(sends=[(some.view(torch.int32), 1)]).wait()
        if comm.rank == 1:
            comm.exchange(receives=[(some, 0)]).wait()

    monkeypatch.setattr(Exchange, "gather_rows", planted_in_gather(sends))
    (fault,) = faults(rehearsed(*ULYSSES))
    assert "32 bytes of int32" in fault
    assert "receives 32 bytes of float32" in fault


def test_what_could_not_be_replayed_is_said() -> None:
    some = rehearsed("topology=cpu_x4", "task.num_frames=5", "sampler.steps=1", ranks=[0, 1])
    (note,) = (note for note in some.notes if "replayed" in note)
    assert "ranks [2, 3] were not rehearsed" in note
    assert "ulysses 0-1" not in note


@pytest.mark.thorough
@pytest.mark.long
def test_a_buffer_that_is_kept_too_long_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Tensor] = []
    run = bound_ops.SpatialUp.run

    def keeps(self: bound_ops.SpatialUp, flow: bound_ops.Flow) -> None:
        run(self, flow)
        kept.append(flow.at.buffer)

    monkeypatch.setattr(bound_ops.SpatialUp, "run", keeps)
    found = rehearsed()
    assert kinds(found) == {"memory"}
    assert {finding.stage for finding in found.findings} == {"decode"}
    assert any("bound_ops.py" in finding.text for finding in found.findings)


@pytest.mark.long
def test_a_list_that_holds_every_chunk_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Tensor] = []
    stream = ParallelVAE.decode_stream

    def keeps(self: ParallelVAE, z: Tensor) -> Iterator[Tensor]:
        for chunk in stream(self, z):
            kept.append(chunk)
            yield chunk

    monkeypatch.setattr(ParallelVAE, "decode_stream", keeps)
    found = rehearsed("topology=cpu_x2")
    assert any("still held after the last frame" in finding.text for finding in found.findings)
    assert {(finding.kind, finding.rank) for finding in found.findings} == {("memory", 0)}


@pytest.mark.long
def test_an_index_of_the_host_into_a_tensor_of_the_accelerator_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = ParallelTransformer.hidden

    def indexes(self: ParallelTransformer, passes: Any, embedded: Sequence[Tensor]) -> Iterator[Tensor]:
        return layers(self, passes, [x[torch.arange(len(x))] for x in embedded])

    monkeypatch.setattr(ParallelTransformer, "hidden", indexes)
    found = rehearsed()
    assert "device" in kinds(found)
    assert any("torch.arange(len(x))" in finding.text for finding in found.findings)


@pytest.mark.long
def test_what_a_rank_raises_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = ParallelTransformer.hidden

    def mixes(self: ParallelTransformer, passes: Any, embedded: Sequence[Tensor]) -> Iterator[Tensor]:
        return layers(self, passes, [x + torch.ones(x.shape) for x in embedded])

    monkeypatch.setattr(ParallelTransformer, "hidden", mixes)
    found = rehearsed()
    assert {"device", "raised"} <= kinds(found)


def planted_in_layers(extra: Callable[[Tensor], object]) -> Any:
    """`ParallelTransformer.hidden`, of every step, which does `extra` with its input before its own work."""
    layers = ParallelTransformer.hidden

    def planted(self: ParallelTransformer, passes: Any, embedded: Sequence[Tensor]) -> Iterator[Tensor]:
        extra(embedded[0])
        return layers(self, passes, embedded)

    return planted


@pytest.mark.long
def test_what_every_step_leaves_is_found_by_its_line(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Tensor] = []
    monkeypatch.setattr(ParallelTransformer, "hidden", planted_in_layers(lambda x: kept.append(x[:8].clone())))
    (finding,) = rehearsed("sampler.steps=20").findings
    assert "every step leaves" in finding.text
    assert "kept.append(x[:8].clone())" in finding.text


@pytest.mark.thorough
@pytest.mark.long
def test_a_synchronization_in_every_step_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ParallelTransformer, "hidden", planted_in_layers(lambda x: torch.cuda.synchronize()))
    (finding,) = rehearsed().findings
    assert finding.kind == "wait"
    assert "torch.cuda.synchronize()" in finding.text


@pytest.mark.long
def test_products_that_are_not_planned_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ParallelTransformer, "hidden", planted_in_layers(lambda x: (x @ x.T) @ (x @ x.T)))
    found = rehearsed()
    assert "flops" in kinds(found)


@pytest.mark.long
def test_a_copy_from_the_host_in_every_step_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def copies(embedded: Tensor) -> None:
        torch.zeros(4096, 1024).to(embedded.device, non_blocking=True)

    monkeypatch.setattr(ParallelTransformer, "hidden", planted_in_layers(copies))
    found = rehearsed("topology=h100_x1")
    assert any("from the host" in finding.text for finding in found.findings)


@pytest.mark.thorough
@pytest.mark.long
def test_a_wait_for_every_frame_outside_of_the_decoder_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    decode = DecodeStage._decode

    def reads(self: DecodeStage, context: RunContext) -> Iterator[Tensor]:
        for chunk in decode(self, context):
            yield chunk.cpu()

    monkeypatch.setattr(DecodeStage, "_decode", reads)
    (finding,) = rehearsed().findings
    assert "outside of stages" in finding.text
    assert "yield chunk.cpu()" in finding.text


# ------------------------------------------------------------ the job
@pytest.mark.thorough
@pytest.mark.long
def test_the_job_leaves_its_report_and_fails_where_something_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = ["job=rehearse", SHORT, "model=nano", "task.num_frames=5", "topology=h100_x1"]
    rehearse(prepare(composition_of(overrides)), tmp_path, multirun=False)
    report = json.loads((tmp_path / "rehearsal.json").read_text())
    assert report["findings"] == []
    assert set(report["ranks"][0]["stages"]) == {"text", "denoise", "decode"}
    decode = report["ranks"][0]["stages"]["decode"]
    assert decode["flops"] == pytest.approx(decode["planned"]["flops"], rel=0.01)
    assert sum(kind["seconds"] for kind in decode["kinds"].values()) == pytest.approx(decode["roofline_seconds"])
    assert decode["costliest"][0]["name"] == "convolution"
    assert "# Rehearsal" in (tmp_path / "rehearsal.md").read_text()
    assert "as planned" in capsys.readouterr().out
    page = [*overrides, "rehearse.format=markdown"]
    rehearse(prepare(composition_of(page)), tmp_path, multirun=False)
    assert capsys.readouterr().out == (tmp_path / "rehearsal.md").read_text()
    test_a_wait_in_every_step_is_found(monkeypatch)
    with pytest.raises(RehearsalFailed) as failed:
        rehearse(prepare(composition_of(["job=rehearse", SHORT])), tmp_path, multirun=False)
    assert isinstance(failed.value.code, str)  # which Python prints, and ends with exit code 1
    assert json.loads((tmp_path / "rehearsal.json").read_text())["findings"]


REFUSED = {
    "no such rank": (["job=rehearse", "rehearse.ranks=[1]"], "rehearse.ranks"),
    "no rank": (["job=rehearse", "rehearse.ranks=[]"], "rehearse.ranks"),
    "twice": (["job=rehearse", "topology=cpu_x2", "rehearse.ranks=[0,0]"], "rehearse.ranks"),
    "unread": (["rehearse.ranks=[0]"], "job=generate"),
    "format unread": (["rehearse.format=markdown"], "rehearse.format"),
    "objective": (["job=rehearse", "objective=seconds"], "objective"),
    "no photograph": (["job=rehearse", "task=i2v"], "task.image"),
}


@pytest.mark.parametrize(("overrides", "named"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_rehearsed_is_refused(overrides: list[str], named: str) -> None:
    with pytest.raises(ConfigError) as refused:
        prepare(composition_of(overrides))
    assert any(named in problem.what for problem in refused.value.problems)


def test_torchrun_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ConfigError, match="torchrun"):
        prepare(composition_of(["job=rehearse"]))


def test_a_sweep_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="-m"):
        rehearse(prepare(composition_of(["job=rehearse"])), tmp_path, multirun=True)


# ------------------------------------------------------------ the tracker
def test_small_tensors_have_values_where_these_follow_from_the_host() -> None:
    used = tracker()
    with rehearsing(used):
        numbers = torch.tensor([3, 5, 7], device=ACCELERATOR)
        assert numbers.is_meta
        assert (numbers + 1)[1].item() == 6
        assert (numbers > 4).nonzero().shape == (2, 1)
        numbers[0] = 9
        assert numbers[numbers > 4].tolist() == [9, 5, 7]
    assert used.waits.total() == 5  # the first is for the numbers themselves


def test_values_that_nobody_knows_end_a_rehearsal_only_where_a_shape_depends_on_them() -> None:
    with rehearsing(tracker()):
        unknown = torch.empty(4, device=ACCELERATOR)
        assert unknown.sum().item() == 1.0
        assert bool(torch.isfinite(unknown).all())
        with pytest.raises(NotRehearsed, match="depends on values"):
            unknown.nonzero()


def test_memory_counts_until_the_last_view_is_gone() -> None:
    used = tracker()
    with rehearsing(used):
        whole = torch.empty(1000, device=ACCELERATOR)
        part = whole[:10]
        del whole
        assert used.live == 4000
        del part
        assert used.live == 0
    assert used.peak == 4000
    assert used.holders[0][0].text == "whole = torch.empty(1000, device=ACCELERATOR)"


def tracker() -> Tracker:
    return Tracker(accelerator_of(compose(["topology=h100_x1"])))


def works_of(used: Tracker) -> dict[str, Work]:
    """The kernels that were launched, by name."""
    return {kernel.name: work for kernel, work in used.roofline.works.items()}


def test_a_kernel_takes_what_bounds_it() -> None:
    used, half = tracker(), {"dtype": torch.bfloat16, "device": ACCELERATOR}
    with rehearsing(used):
        large = torch.empty(8192, 8192, **half)
        large @ large
        large.mul_(2)
        F.conv3d(torch.empty(1, 16, 4, 32, 32, **half), torch.empty(16, 16, 3, 3, 3, **half), padding=1)
        heads = torch.empty(1, 4, 128, 64, **half)
        F.scaled_dot_product_attention(heads, heads[:, :2], heads[:, :2], enable_gqa=True)
    works = works_of(used)
    assert works["mm"] == (1, 3 * 2 * 8192**2, 2 * 8192**3, 2 * 8192**3 / 989e12)
    assert works["mul_"] == (1, 2 * 2 * 8192**2, 0, pytest.approx(2 * 2 * 8192**2 / 3350e9))
    assert works["convolution"].flops == 2 * 27 * 16 * 16 * 4 * 32 * 32
    assert works["attention"].flops == 2 * 2 * 4 * 128 * 128 * 64
    kinds = by_kind(used.roofline.works)
    assert kinds["matmul and attention"].calls == 2
    assert kinds["everything else"].flops == 0


@pytest.mark.parametrize(("into", "read"), [("into", 8000), ("out", 4000)])
def test_an_op_of_another_library_is_one_kernel(into: str, read: int) -> None:
    """A tensor that the op changes counts as read too, unless the op names it `out`."""
    used = tracker()
    with torch.library._scoped_library("rehearsed", "FRAGMENT") as library:
        library.define(f"scaled(Tensor x, Tensor(a!) {into}) -> Tensor")

        def scaled(x: Tensor, changed: Tensor) -> Tensor:
            changed.copy_(x * 2)
            return x.new_empty(3, dtype=torch.float32)

        library.impl("scaled", scaled, "Meta")
        with rehearsing(used):
            x, changed = (torch.empty(1000, device=ACCELERATOR) for _ in range(2))
            small = torch.ops.rehearsed.scaled(x, changed)
            assert used.live == 4000 + 4000 + 12
            del small
            assert used.live == 8000
    (kernel,) = used.roofline.works
    assert kernel.name == "rehearsed::scaled"
    assert used.roofline.works[kernel][:3] == (1, read + 4000 + 12, 0)


def test_pinned_memory_and_copies_from_it_are_counted() -> None:
    used = tracker()
    with rehearsing(used):
        kept = torch.empty(1000, dtype=torch.bfloat16, pin_memory=True)
        torch.empty(1000, dtype=torch.bfloat16, device=ACCELERATOR).copy_(kept, non_blocking=True)
        assert used.pinned_bytes == 2048
        del kept
    assert (used.pinned_bytes, used.most_pinned_bytes, used.copied_bytes) == (0, 2048, 2000)
    assert not used.waits
