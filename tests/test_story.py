"""The whole story on the checkerboard: train, evaluate, export, load, recommend."""

import recllm
from recllm.collaborative import load_collaborative
from recllm.outcome import FUSION, WITHOUT_LM, evaluate_run
from recllm.runs import load_run
from recllm.scoring import known_scores
from recllm.tasks import prepare


def test_from_a_run_file_to_recommendations(tiny_run, tiny_bundle):
    run = load_run(tiny_run)
    task = prepare(run)
    scores = known_scores(run, task, load_collaborative(run, task), lambda _: None)
    valid, test = (evaluate_run(run, task, scores[part], part=part) for part in ("valid", "test"))
    parts = [name for name in valid.scorers if name not in {FUSION, WITHOUT_LM}]
    fusion = valid.interval(FUSION, "NDCG@10")[0]
    assert all(fusion >= valid.interval(name, "NDCG@10")[0] - 1e-9 for name in parts)
    assert test.interval(FUSION, "NDCG@10")[0] >= 1.4 * test.interval("mf", "NDCG@10")[0]

    recommender = recllm.load(tiny_bundle)
    histories = [example.query.history for example in task.split.test]
    out = recommender.recommend(histories, k=10)
    hits = [example.item_id in ids for example, ids in zip(task.split.test, out.ids, strict=True)]
    assert sum(hits) / len(hits) == test.interval(FUSION, "HitRate@10")[0]
    first = [ids[0] == example.item_id for example, ids in zip(task.split.test, out.ids, strict=True)]
    assert sum(first) >= 0.9 * len(first)
    own_half = [
        int(item) % 2 == int(history[0]) % 2
        for history, ids in zip(histories, out.ids, strict=True)
        for item in ids[:2]
    ]
    assert sum(own_half) >= 0.95 * len(own_half)
