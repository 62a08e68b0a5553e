import sys; sys.path.insert(0, "tests"); import pytest, time
from test_judging import *
@pytest.mark.parametrize("lr", [1e-2, 2e-2])
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("m", ["tiny_lm_folder", "tiny_encoder_folder"])
def test_x(lr, seed, m, given_folder, tiny_encoder_folder, cache, tmp_path, request):
    run = settings(given_folder, request.getfixturevalue(m), tmp_path, tiny_encoder_folder, per_device_train_batch_size=8, eval_steps=35, learning_rate=lr, head_learning_rate=lr).model_copy(update={"seed": seed})
    t=time.time()
    task = train_run(run, say=lambda _: None)
    a = tables(run, task)["test"].interval("relevance", "AUC")[0]
    open("/tmp/conv.txt","a").write(f"{m} {seed} {lr} {a:.3f} {time.time()-t:.1f}\n")
