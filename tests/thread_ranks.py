"""Ranks as threads of one process, whose reducers sum over them all: what several processes do, without any."""

import threading


def in_ranks(number, work):
    """`work(reducer)` in as many threads, whose reducers sum over them all; returns the results by rank."""
    barrier, flats, results = threading.Barrier(number, timeout=600), [None] * number, [None] * number

    class Reducer:
        world_size = number

        def __init__(self, rank):
            self.rank = rank

        def all_reduce_(self, flat):
            flats[self.rank] = flat.clone()
            barrier.wait()
            total = sum(flats[1:], flats[0])
            barrier.wait()
            flat.copy_(total)

    def run(rank):
        try:
            results[rank] = work(Reducer(rank))
        except BaseException as error:
            results[rank] = error
            barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    errors = [result for result in results if isinstance(result, BaseException)]
    if errors:  # a rank that waits when another fails hears of a broken barrier alone
        raise next((error for error in errors if not isinstance(error, threading.BrokenBarrierError)), errors[0])
    return results
