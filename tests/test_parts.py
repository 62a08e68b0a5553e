"""Parts of a batch job: what a kill tears is taken away, so that the job can go on as often as it is killed."""

from recllm.parts import JOURNAL, Counts, Parts, folder_of


def test_a_torn_line_of_the_journal_is_in_the_way_of_no_later_one(tmp_path):
    target = tmp_path / "out.csv"
    for done in range(3):
        parts = Parts(target, {"k": 1}, overwrite=False)
        assert (parts.done, parts.counts.rejected) == (done, done)
        parts.add(None, [{"line": done + 1, "reason": "bad", "row": {}}], Counts(rejected=1))
        parts.close()
        with (folder_of(target) / JOURNAL).open("ab") as journal:
            journal.write(b'{"answered": 1')  # killed while it wrote the next one
    last = Parts(target, {"k": 1}, overwrite=False)
    assert (last.done, last.first) == (3, "line 1: bad")
    last.remove()
