"""Counts the messages and bytes that a rank sends, for comparison with the plan's prediction."""

from __future__ import annotations

from dataclasses import dataclass, field

# Kinds of messages in which this rank sends payload. A collective counts the payload that this rank contributes.
SENDING = ("send", "broadcast", "all_gather")


@dataclass
class Count:
    """Number of calls and payload bytes of one kind of message."""

    calls: int = 0
    bytes: int = 0


@dataclass
class Ledger:
    """Calls and bytes of one rank by kind: send, recv, broadcast, all_gather, and control.

    A broadcast is counted on its source rank only. `control` is the agreement before and after a run; it has no
    tensors, and no plan predicts it.
    """

    counts: dict[str, Count] = field(default_factory=dict)

    def record(self, kind: str, nbytes: int) -> None:
        count = self.counts.setdefault(kind, Count())
        count.calls += 1
        count.bytes += nbytes

    @property
    def sent_bytes(self) -> int:
        """Payload bytes that this rank has sent."""
        return sum(self.counts[kind].bytes for kind in SENDING if kind in self.counts)

    @property
    def sent_messages(self) -> int:
        """Messages and collectives in which this rank has sent payload."""
        return sum(self.counts[kind].calls for kind in SENDING if kind in self.counts)

    def snapshot(self) -> Ledger:
        """A copy of the counts as they are now."""
        return Ledger({kind: Count(c.calls, c.bytes) for kind, c in self.counts.items()})

    def since(self, before: Ledger) -> Ledger:
        """The counts since `before`, a snapshot of this ledger."""
        out = Ledger()
        for kind, count in self.counts.items():
            old = before.counts.get(kind, Count())
            if count.calls > old.calls:
                out.counts[kind] = Count(count.calls - old.calls, count.bytes - old.bytes)
        return out

    def as_dict(self) -> dict[str, dict[str, int]]:
        """For JSON: kind -> {calls, bytes}."""
        return {kind: {"calls": c.calls, "bytes": c.bytes} for kind, c in sorted(self.counts.items())}
