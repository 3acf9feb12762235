"""Checks at test time: does this input carry a trigger? Each is called with (encoder, images) and gives Scores.

Higher is more suspicious. A score depends on the record and on the clean images alone, so checks go into any program:

    check = MaskingPath(paths=4)                            # or registry.make("check", "masking_path:paths=4")
    scores = check(encoder, images, clean=clean)            # images, clean: Pairs; scores.values float32 (N,)

`needs` names what a check is called with by keyword: `clean`, a few hundred clean Pairs it is calibrated on; `classifier`, a
`classifiers.Classifier`; `report`, (done, in all, at what). A threshold is the caller's; `bezoar check` takes a quantile of
clean images that calibrated nothing.
"""
