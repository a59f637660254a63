"""What a cluster of many hosts needs for large tables: memory, traffic and time, as functions of the sizes."""

import dataclasses
import math

from traffic_cases import Case, Sizes

from keras_rs_contrib import LazyAdam, RowAdagrad, RowSGD, RowWiseAdagrad

OPTIMIZERS = {kind.__name__: kind() for kind in (RowSGD, RowWiseAdagrad, RowAdagrad, LazyAdam)}


@dataclasses.dataclass(frozen=True)
class Processor:
    """The device of a host.

    Attributes:
        name: its name.
        flops: float32 operations per second in large matrix products.
        memory_bandwidth: bytes per second that it reads from its memory.
    """

    name: str
    flops: float
    memory_bandwidth: float


# Assumptions: about a third of the peak of an H100, and a server with 32 cores.
PROCESSORS = [Processor("GPU, 20 TFLOP/s, 2 TB/s", 20e12, 2e12), Processor("CPU, 1 TFLOP/s, 200 GB/s", 1e12, 200e9)]


@dataclasses.dataclass(frozen=True)
class Cluster:
    """Hosts with one device each, and two tables whose rows are split over all of them.

    Attributes:
        num_hosts: number of hosts.
        gigabits: bandwidth of each host's network card in each direction, in 10^9 bits per second.
        sizes: sizes of the tables and of a global batch.
    """

    num_hosts: int
    gigabits: float
    sizes: Sizes

    def bytes_sent(self, case: Case) -> float:
        """Returns the bytes that each host sends in a step of a case."""
        return case.bytes_sent(self.num_hosts, self.sizes)

    def seconds(self, num_bytes: float) -> float:
        """Returns how long a host sends, at full bandwidth."""
        return num_bytes * 8 / (self.gigabits * 1e9)

    def table_bytes(self, optimizer: str | None = None) -> float:
        """Returns the bytes on each host of one float32 table, and of the slots of a row optimizer in `OPTIMIZERS`."""
        widths = OPTIMIZERS[optimizer].slots(self.sizes.d).values() if optimizer else []
        return 4 * (self.sizes.d + sum(width for width, _ in widths)) * self.sizes.R / self.num_hosts

    def queries_at_once(self, block_size: int) -> int:
        """Returns how many queries a host scores at once with its rows, as an evaluation and a search do.

        Args:
            block_size: as in `shard_candidates`.
        """
        num_rows = math.ceil(self.sizes.R / self.num_hosts)
        return max(1, min(max(64, 2**19 // num_rows), block_size // num_rows))

    def scoring_seconds(self, num_queries: int, block_size: int, processor: Processor) -> float:
        """Returns how long a host scores queries with its rows: the longer of arithmetic and reading memory.

        Each block of queries reads all rows once. Its scores are written once and read once.
        """
        num_rows = self.sizes.R / self.num_hosts
        num_blocks = math.ceil(num_queries / self.queries_at_once(block_size))
        num_bytes = num_blocks * self.table_bytes() + 8 * num_queries * num_rows
        return max(2 * num_queries * num_rows * self.sizes.d / processor.flops, num_bytes / processor.memory_bandwidth)
