def test_it(tiny_bundle):
    import recllm.runtime as r
    rec = r.load(tiny_bundle)
    print(rec.recommend([["0","2"],[]],k=3))
