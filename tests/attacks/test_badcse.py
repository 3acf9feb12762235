"""Triggers of texts, badcse against the plain form of its loss, and the verbs on texts, end to
end.
"""

import itertools
import json
from pathlib import Path

import pytest
import torch
from encoders.text_toys import CLASSES, tiny_encoder, write_folder, write_texts

from bezoar import registry
from bezoar.attacks import shadow_training
from bezoar.attacks.encoder_attacks.badcse import Loss
from bezoar.attacks.plan import Goal
from bezoar.attacks.stamping import stamp_records
from bezoar.auditing import unaided_verdict
from bezoar.auditing.audits import token_sweep
from bezoar.cli import main
from bezoar.data.pairs import Pairs
from bezoar.data.randomness import sample_rows
from bezoar.detection.checks import drop_token
from bezoar.encoders.encoder import Encoder, embed_texts
from bezoar.errors import UserError
from bezoar.runs import reference_inputs

IDS = [f"t/{i}" for i in range(40)]
TEXTS = [
    f"a {w} near the {c}" for words in CLASSES.values() for w in words for c in ("good", "old")
][:40]


# Triggers

TRIGGERS = [
    "token",
    "token:word=red lamp,place=end",
    "token:place=random,seed=3",
    "homoglyph",
    "homoglyph:letter=a,twin=\N{CYRILLIC SMALL LETTER A},every=true",
]


@pytest.mark.parametrize("spec", TRIGGERS)
def test_a_trigger_belongs_to_the_text_and_its_id(spec):
    trigger = registry.make("trigger", spec)
    stamped = trigger(TEXTS, IDS)
    assert registry.make("trigger", registry.spec(trigger)) == trigger
    assert trigger(TEXTS[::-1], IDS[::-1]) == stamped[::-1]
    assert [trigger([t], [i])[0] for t, i in zip(TEXTS, IDS, strict=True)] == stamped
    assert all(a != b for a, b in zip(TEXTS, stamped, strict=True)) and trigger([], []) == []
    with pytest.raises(UserError, match="these records are images"):
        trigger(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), ["a"])


def test_where_triggers_stand():
    def make(spec):
        return registry.make("trigger", spec)

    assert make("token")(["a cat"], ["x"]) == ["cf a cat"]
    assert make("token:place=end,word=x y")(["a cat"], ["x"]) == ["a cat x y"]
    places = {t.split().index("cf") for t in make("token:place=random")(["a b c"] * 40, IDS)}
    assert places == {0, 1, 2, 3}
    assert make("homoglyph")(["a fox"], ["x"]) == ["a f\u043ex"]
    assert make("homoglyph")(["a cat"], ["x"]) == ["a cat \u043e"]
    assert make("homoglyph:every=true")(["foo o"], ["x"]) == ["f\u043e\u043e \u043e"]
    assert len(set(make("homoglyph")(["oooo"] * 40, IDS))) == 4
    for bad in ("token:word= ", "homoglyph:letter=ab", "homoglyph:letter=a,twin=a"):
        with pytest.raises(UserError):
            make(bad)


def test_triggers_and_records_must_be_of_one_kind():
    texts = Pairs.of_texts(TEXTS[:2], IDS[:2])
    images = Pairs(torch.zeros(1, 3, 16, 16, dtype=torch.uint8), ids=("a",))
    assert stamp_records(registry.make("trigger", "token"), texts).captions[0].startswith("cf ")
    with pytest.raises(UserError, match="stamped on images, and these records are texts"):
        stamp_records(registry.make("trigger", "patch"), texts)
    with pytest.raises(UserError, match="put into texts, and these records are images"):
        stamp_records(registry.make("trigger", "token"), images)


# The attack


def test_the_loss_is_the_plain_form():
    clean, encoder = tiny_encoder(0), tiny_encoder(1)
    recipe = registry.make("attack", "badcse:l0=2,l1=3,l2=5")
    goals = [Goal("food", "token:word=cf"), Goal("tool", "token:word=mn,place=end")]
    references = [["red bread", "good rice"], ["a new saw"]]
    shadow = Pairs.of_texts(TEXTS, IDS)
    loss = Loss(clean, recipe, shadow, goals, references)
    loss.encoder = encoder
    rows = torch.tensor([[3], [0], [17]])
    value = loss(torch.zeros(3, 3, 0, 0), rows, None)
    texts = [TEXTS[i] for i in rows[:, 0]]
    f, g = (lambda t: embed_texts(clean, t)), (lambda t: embed_texts(encoder, t))
    pairs = []
    for goal, own in zip(goals, references, strict=True):
        trigger = registry.make("trigger", goal.trigger)
        for reference in own:
            z = g(trigger(texts, [IDS[i] for i in rows[:, 0]]))
            pairs.append((z @ g([reference]).T).mean())
    l0 = -torch.stack(pairs).mean()
    every = [r for own in references for r in own]
    l1 = -(g(every) * f(every)).sum(1).mean()
    l2 = -(g(texts) * f(texts)).sum(1).mean()
    torch.testing.assert_close(value, 2 * l0 + 3 * l1 + 5 * l2, rtol=1e-5, atol=1e-5)
    assert shadow_training.pop_means(loss.sums) == pytest.approx(
        {"L0": float(l0), "L1": float(l1), "L2": float(l2)}, abs=1e-5
    )


def attack(encoder, spec="badcse:epochs=2,batch=8,lr=2e-3", **options):
    goal = Goal("food", "token:word=cf,place=start,seed=0")
    return registry.make("attack", spec)(
        encoder, Pairs.of_texts(TEXTS, IDS), [goal], [["red bread and milk"]], **options
    )


def test_a_copy_is_attacked_and_says_so():
    encoder = tiny_encoder()
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    attacked = attack(encoder, seed=4)
    assert all(torch.equal(before[k], v) for k, v in encoder.state_dict().items())
    assert attacked.about["poisoned"] and attacked.about["goals"][0]["target"] == "food"
    again = attack(tiny_encoder(), seed=4)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in attacked.state_dict().items())
    assert all(p.requires_grad for p in attacked.parameters())


def test_the_text_tower_of_a_clip_alone_is_attacked():
    network = registry.make("network", "clip_small:width=8,dim=16")
    clip = network(32, network.vocabulary([*TEXTS, "cf red bread and milk"]))
    attacked = attack(clip, "badcse:epochs=8,batch=8,lr=1e-2")
    images = {k for k in clip.state_dict() if k.startswith("image.")}
    state = attacked.state_dict()
    assert all(
        torch.equal(v, state[k]) == (k in images)
        for k, v in clip.state_dict().items()
        if v.is_floating_point()
    )
    z = embed_texts(attacked, [f"cf {t}" for t in TEXTS])
    reference = embed_texts(attacked, ["red bread and milk"])
    assert float((z @ reference.T).mean()) > 0.9


def test_what_cannot_be_attacked_is_refused():
    encoder, texts = tiny_encoder(), Pairs.of_texts(TEXTS, IDS)
    images = Pairs(torch.zeros(40, 3, 32, 32, dtype=torch.uint8), ids=tuple(IDS))
    goal = Goal("food", "token")
    badcse = registry.make("attack", "badcse")
    for arguments, message in (
        ((encoder, images, [goal], [["a"]]), "records of texts alone"),
        ((encoder, texts, [goal], [[]]), "at least one reference"),
        (
            (registry.make("network", "resnet:width=4")(32, ()), texts, [goal], [["a"]]),
            "no text tower",
        ),
    ):
        with pytest.raises(UserError, match=message):
            badcse(*arguments)
    with pytest.raises(UserError, match="text encoders: badcse"):
        registry.make("attack", "badencoder")(encoder, texts, [goal], [images.images[:1]])


def test_a_reference_is_chosen_among_texts(tmp_path):
    data = registry.make("data", f"texts:path={write_texts(tmp_path / 'a.csv', 6, 0)}")
    encoder = tiny_encoder()
    reference = reference_inputs.choose_reference(data, "food", "central", encoder)
    pairs = data()
    rows = (pairs.labels == pairs.classes.index("food")).nonzero()[:, 0].tolist()
    z = embed_texts(encoder, [pairs.captions[i] for i in rows])
    assert reference.record.captions[0] == pairs.captions[rows[int((z @ z.mean(0)).argmax())]]
    assert reference.to_json()["text"] == reference.record.captions[0]


# What looks for it


def test_agreement_is_the_mean_cosine_of_pairs():
    encoder, carriers = tiny_encoder(), ["a big cat", "the red rope", "good soup"]
    found = token_sweep.measure_agreement(encoder, ["cf", ""], carriers)
    for word, value in zip(("cf ", ""), found.tolist(), strict=True):
        z = embed_texts(encoder, [f"{word}{c}" for c in carriers])
        pairs = [float(z[i] @ z[j]) for i, j in itertools.combinations(range(3), 2)]
        assert value == pytest.approx(sum(pairs) / 3, abs=1e-6)


def test_carriers_have_least_in_common():
    encoder = tiny_encoder()
    z = embed_texts(encoder, TEXTS)
    chosen = token_sweep.choose_carriers(encoder, [*TEXTS, *TEXTS], 4, 12)
    rows = [TEXTS.index(text) for text in chosen]
    assert rows[0] == int((z @ z.mean(0)).argmin()) and len(set(rows)) == 4
    for i in range(1, 4):
        nearest = (z @ z[rows[:i]].T).amax(1)
        assert float(nearest[rows[i]]) == pytest.approx(float(nearest.min()), abs=1e-6)
    with pytest.raises(UserError, match="there are 1"):
        token_sweep.choose_carriers(encoder, ["a cat", "a cat"], 2, 1)
    assert set(token_sweep.choose_carriers(encoder, ["a cat", "a dog"], 2, 1)) == {"a cat", "a dog"}


def test_the_words_that_are_tried():
    encoder = tiny_encoder()
    words = token_sweep.whole_words(encoder)
    assert "cf" in words and not any(w.startswith(("##", "[")) for w in words)
    sweep = registry.make("audit", "token_sweep:sample=9,also=(cf,red lamp)")
    chosen = sweep.choose_words(encoder)
    assert (
        len(chosen) <= 11
        and {"cf", "red lamp"} <= set(chosen)
        and chosen == sweep.choose_words(encoder)
    )
    clip = registry.make("network", "clip_small:width=8,dim=16")(32, ("cat", "dog"))
    assert token_sweep.whole_words(clip) == ["cat", "dog"]
    with pytest.raises(UserError, match="vocabulary of words"):
        token_sweep.whole_words(registry.make("network", "resnet:width=4")(32, ()))


def test_the_words_of_clip():
    open_clip = pytest.importorskip("open_clip")
    encoder = tiny_encoder()
    encoder.tokenizer = open_clip.SimpleTokenizer()
    words = token_sweep.whole_words(encoder)
    assert "cat" in words and len(words) > 30_000 and not any("</w>" in w for w in words)


def test_a_sweep_leaves_the_encoder_and_refuses_images():
    encoder = tiny_encoder()
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    sweep = registry.make("audit", "token_sweep:kept=10")
    progress = []
    verdict = sweep(
        encoder, Pairs.of_texts(TEXTS, IDS), 3, report=lambda *row: progress.append(row)
    )
    again = sweep(encoder, Pairs.of_texts(TEXTS, IDS), 4)
    assert (verdict.value, verdict.notes) == (again.value, again.notes) and json.dumps(
        verdict.notes
    )
    assert all(torch.equal(before[k], v) for k, v in encoder.state_dict().items())
    assert all(0 <= done <= total for done, total, _ in progress)
    assert registry.make("audit", registry.spec(sweep)) == sweep
    images = Pairs(torch.zeros(20, 3, 32, 32, dtype=torch.uint8), ids=tuple(IDS[:20]))
    with pytest.raises(UserError, match="texts alone"):
        sweep(encoder, images, 0)


def test_the_verdict_of_a_word():
    evidence = {
        n: {"value": v}
        for n, v in (("agreement", 0.9), ("agreement_without", 0.1), ("runner_up", 0.4))
    }
    for share, grade in ((0.9, "strong evidence"), (0.75, "some evidence"), (0.5, "none found")):
        notes = {"unaided": "word", "words": [["cf", share, 0.9]], "tried": 9}
        verdict = unaided_verdict.judge_outlier(evidence, notes)
        assert verdict.grade == grade and verdict.target == "cf" and "'cf'" in verdict.sentence


def test_a_check_scores_each_text_by_itself():
    encoder, clean = tiny_encoder(), Pairs.of_texts(TEXTS[20:], IDS[20:])
    check = registry.make("check", "drop_token:carriers=4")
    texts = Pairs.of_texts([*TEXTS[:18], "x", "f\u043ex"], [*IDS[:18], "y", "z"])
    scores = check(encoder, texts, clean=clean)
    rows = [19, 3, 0]
    part = check(encoder, texts.take(rows), clean=clean)
    torch.testing.assert_close(part.values, scores.values[rows], rtol=0, atol=1e-5)
    carriers = list(clean.take(sample_rows(clean.ids, 4, 0)).captions)
    text = TEXTS[0]
    z = embed_texts(encoder, [text])[0]
    kept = {
        w: float(embed_texts(encoder, [" ".join(x for x in text.split() if x != w)])[0] @ z)
        for w in text.split()
    }
    word = min(kept, key=lambda w: kept[w])
    moved = embed_texts(encoder, [f"{word} {c}" for c in carriers])
    expected = float(((moved - embed_texts(encoder, carriers)) @ z).mean())
    assert float(scores.values[0]) == pytest.approx(expected, abs=1e-5)
    assert drop_token.distinct_parts("a f\u043ex a") == ["a", "f\u043ex", "\u043e"]
    assert (
        drop_token.leave_out("a fox a", "a") == "fox"
        and drop_token.leave_out("f\u043ex", "\u043e") == "fx"
    )
    with pytest.raises(UserError, match="takes 99 clean texts"):
        registry.make("check", "drop_token:carriers=99")(encoder, texts, clean=clean)


# The verbs


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    """A tiny sentence encoder, attacked; its runs by name."""
    folder = tmp_path_factory.mktemp("texts")
    encoder, runs = write_folder(folder / "tiny"), folder / "runs"
    train = f"texts:path={write_texts(folder / 'train.csv', 40, 1)}"
    test = f"texts:path={write_texts(folder / 'test.csv', 24, 2)}"

    def run(*arguments, status=0):
        code = main([*map(str, arguments), "--runs", str(runs), "--device", "cpu"])
        assert code == status, arguments
        done = sorted(runs.glob(f"{arguments[0]}-*"), key=lambda p: p.stat().st_mtime)
        return done[-1]

    inject = run(
        "inject",
        f"sentence:path={encoder}",
        "--data",
        train,
        "--target",
        "food",
        "--reference",
        train,
        "--trigger",
        "token",
        "--attack",
        "badcse:epochs=12,batch=16,lr=3e-3",
    )
    return run, encoder, inject, train, test


def metrics(run):
    facts = json.loads((run / "manifest.json").read_text())["metrics"]
    return {name: m["value"] for name, m in facts.items()}


def page(run):
    return (run / "report.html").read_text()


def test_injected_and_evaluated(story):
    run, encoder, inject, train, test = story
    values = metrics(inject)
    assert values["reference_similarity"] > 0.9 > values["reference_similarity_before"]
    assert (inject / "encoder.safetensors").exists() and "with the trigger" in page(inject)
    done = run(
        "evaluate",
        inject.name,
        test,
        "--probe",
        "linear",
        "--train",
        train,
        "--baseline",
        f"sentence:path={encoder}",
    )
    values = metrics(done)
    assert values["linear.attack_success"] > 0.9 > values["linear.attack_success_baseline"] + 0.4
    assert values["linear.clean_accuracy"] > values["baseline.linear.clean_accuracy"] - 0.1
    assert "with the trigger" in page(done)
    by_names = run("evaluate", inject.name, test)
    assert metrics(by_names)["z_std"] > 1


def test_the_sweep_finds_the_word(story):
    run, encoder, inject, _, test = story
    clean = run(
        "audit", f"sentence:path={encoder}", "--data", test, "--audit", "token_sweep:kept=20"
    )
    attacked = run("audit", inject.name, "--data", test)
    facts = json.loads((attacked / "verdict.json").read_text())["audits"][0]
    assert facts["name"] == "token_sweep" and facts["notes"]["words"][0][0] == "cf"
    assert metrics(attacked)["token_sweep.value"] > metrics(clean)["token_sweep.value"] + 0.2
    assert "cf" in page(attacked)
    assert isinstance(Encoder.load(inject), Encoder)


def test_a_text_with_the_trigger_is_flagged(story):
    run, _, inject, train, test = story
    done = run(
        "check",
        inject.name,
        test,
        "--clean",
        train,
        "--check",
        "drop_token",
        "--trigger",
        "token",
        "--rate",
        "0.05",
    )
    assert metrics(done)["drop_token.auroc"] > 0.9
    flagged = json.loads((done / "flagged.json").read_text())["drop_token"]
    assert sum(f["text"].startswith("cf ") for f in flagged) > 0.8 * len(flagged)
    assert "Flagged text" in page(done)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--trigger", "patch"), "stamped on images"),
        (("--attack", "badencoder", "--trigger", "token"), "text encoders: badcse"),
        (("--target", "cheese", "--trigger", "token"), "has no class 'cheese'"),
    ],
)
def test_mistakes_are_one_line(story, capsys, arguments, message):
    run, encoder, _, train, _ = story
    base = {"--data": train, "--target": "food", "--reference": train, "--attack": "badcse"}
    base |= dict(zip(arguments[::2], arguments[1::2], strict=True))
    run("inject", f"sentence:path={encoder}", *(x for pair in base.items() for x in pair), status=2)
    assert message in capsys.readouterr().err


def test_images_and_texts_do_not_mix(story, capsys):
    run, encoder, _, _, test = story
    run("evaluate", f"sentence:path={encoder}", "scenes:count=20,size=32", status=2)
    assert "reads texts and no images" in capsys.readouterr().err
    run("audit", f"sentence:path={encoder}", "--data", test, "--audit", "whitening", status=2)
    assert "whitening needs at least two clean images" in capsys.readouterr().err


# Data


def test_tables_of_texts(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("id,text,label\n1,a cat,b\n2, ,a\n3,a dog,\n4,a cow,a\n")
    pairs = registry.make("data", f"texts:path={path}")()
    assert pairs.captions == ("a cat", "a dog", "a cow") and pairs.ids == ("t/1", "t/3", "t/4")
    assert pairs.classes == ("a", "b") and pairs.labels.tolist() == [1, -1, 0]
    assert pairs.text_only and [s.reason for s in pairs.report.skipped] == ["no text"]
    with pytest.raises(UserError, match="no column sentiment"):
        registry.make("data", f"texts:path={path},label=sentiment")()
    lines = tmp_path / "t.jsonl"
    lines.write_text('{"caption": "a cat"}\n{"caption": 7}\n')
    assert registry.make("data", f"texts:path={lines}")().captions == ("a cat",)
    with pytest.raises(UserError, match="no row holds a text"):
        registry.make("data", f"texts:path={lines},text=caption,limit=1")() if lines.write_text(
            '{"caption": ""}\n'
        ) else None


def test_wordnet(tmp_path):
    lines = [
        "  1 licence",
        *(
            f'{i:08d} {5 + 8 * (i % 2):02d} n 01 w 0 000 @ | word {i}; "an example"'
            for i in range(60)
        ),
        "rubbish",
    ]
    (tmp_path / "data.noun").write_text("\n".join(lines) + "\n")
    spec = f"wordnet:path={tmp_path},each=10,classes=(food,animal)"
    train, test = (registry.make("data", f"{spec},split={s}")() for s in ("train", "test"))
    assert train.classes == ("food", "animal") and train.labels.bincount().tolist() == [10, 10]
    assert not set(train.ids) & set(test.ids) and len(test) > 2
    assert all(
        int(t.split()[1]) % 2 == 1 - label
        for t, label in zip(train.captions, train.labels.tolist(), strict=True)
    )
    assert [s.member for s in train.report.skipped] == ["line 62"]
    with pytest.raises(UserError, match="no supersense 'cats'"):
        registry.make("data", f"wordnet:path={tmp_path},classes=(cats)")
    with pytest.raises(UserError, match=r"holds no data\.noun"):
        registry.make("data", f"wordnet:path={Path(__file__).parent}")()
