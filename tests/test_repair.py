"""Captions that are there already: judged, repaired, and written out; and the dials of the reward."""

import csv
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import torch

from hierarchical_diffusion_rlhf_caption_refinement import cli
from hierarchical_diffusion_rlhf_caption_refinement.captioner import Captioner
from hierarchical_diffusion_rlhf_caption_refinement.data.scenes import render, sample_scene
from hierarchical_diffusion_rlhf_caption_refinement.data.sources import load_examples
from hierarchical_diffusion_rlhf_caption_refinement.data.text import encode, words_and_owners
from hierarchical_diffusion_rlhf_caption_refinement.inputs import find_drafts
from hierarchical_diffusion_rlhf_caption_refinement.models.diffusion import HIDDEN
from hierarchical_diffusion_rlhf_caption_refinement.models.reward import EVEN, WEAK, Dials
from hierarchical_diffusion_rlhf_caption_refinement.models.saved import reward_from, reward_payload
from hierarchical_diffusion_rlhf_caption_refinement.repair import RARE, USUAL, Draft, changed, diff, read_draft, spliced
from hierarchical_diffusion_rlhf_caption_refinement.utils.config import ConfigError

TEXTS = ["A large red circle, on snow!", "a zebra and a small blue ring", "a star a star and and", "the small heart"]


@pytest.fixture(scope="module")
def captioner(smoke) -> Captioner:
    return Captioner.from_pretrained(smoke / "models/smoke")


@pytest.fixture(scope="module")
def scenes():
    return [render(sample_scene(9, "test", i)) for i in range(4)]


@pytest.fixture
def run(smoke: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: cli.predict(["--checkpoint", str(smoke / "models/smoke/best_rlhf_model.pt"), *map(str, arguments)])


def drafts(count: int) -> None:
    """Two captions of every picture."""
    rows = []
    for i in range(count):
        render(sample_scene(5, "test", i)).save(f"{i}.png")
        rows += [{"image": f"{i}.png", "caption": TEXTS[(i + k) % len(TEXTS)]} for k in range(2)]
    Path("drafts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_suspicion_is_what_the_denoiser_would_rather_say(captioner, scenes):
    """By hand, a word at a time: all others are known, or all but the one before it."""
    text = "a red circle and a star"
    found, seen, editor = captioner.audit(scenes[0], text), captioner.look(scenes[0]), captioner.editor
    (ids,) = encode(captioner.eyes.tokenizer, [text])
    for i, word in enumerate(found.words):
        doubts = []
        for before in (0, HIDDEN - 1):
            step = torch.zeros(1, len(ids), dtype=torch.long)
            step[0, max(i - 1, 0)] = before
            step[0, i] = 1
            logp = editor.denoiser(torch.tensor([ids]), step, torch.tensor([len(ids)]), seen.tokens).logits[0, i].log_softmax(-1)
            doubts.append(float(logp.max() - logp[ids[i]]))
            if before == 0:
                assert word.confidence == pytest.approx(float(logp[ids[i]].exp()), rel=1e-4)
        assert word.suspicion == pytest.approx(max(doubts), abs=1e-4)
    assert found.suspicion == max(word.suspicion for word in found.words) and found.text == found.draft == text
    assert [word.credit == 0 for word in found.words] == [True, False, False, True, True, False]
    assert found.reward == captioner.reward.score(
        torch.tensor([ids + [0] * (captioner.model.max_length - len(ids))]), torch.tensor([len(ids)]), seen.tokens, seen.joint
    )


def test_a_repair_is_liked_better_and_leaves_the_rest_alone(captioner, scenes):
    some = [(scene, text) for scene in scenes for text in TEXTS]
    found = [captioner.refine(scene, text, weak=0.0) for scene, text in some]
    assert any(repair.text != repair.draft for repair in found)
    for (scene, text), repair in zip(some, found, strict=True):
        assert repair.draft == text and (repair.text == text or repair.reward > repair.draft_reward)
        assert ("zebra" in repair.text) == ("zebra" in text)  # the model does not know it
        assert captioner.audit(scene, repair.text).reward == pytest.approx(repair.reward, abs=1e-5)
        if text[0].isupper():
            assert repair.text[0].isupper() and repair.text.endswith("!")
    assert found[0] == captioner.refine(*some[0], weak=0.0)
    assert all(captioner.refine(*one, weak=1000.0).text == one[1] for one in some)


def test_the_threshold_is_what_few_words_of_the_best_validation_captions_reach(captioner, scenes):
    config, weak = captioner.eyes.config, captioner.reward.weak
    examples = load_examples(config.data, config.seed)["val"][:USUAL]
    audits = [max((captioner.audit(e.image(), text) for text in e.captions), key=lambda found: found.reward) for e in examples]
    found = [word.suspicion >= weak for audit in audits for word in audit.words if word.confidence is not None]
    assert np.mean(found) == pytest.approx(RARE, abs=2 / len(found)) and weak != WEAK
    assert [captioner.refine(scenes[0], text) for text in TEXTS] == [captioner.refine(scenes[0], text, weak) for text in TEXTS]
    older = reward_payload(captioner.reward)
    assert older["shape"].pop("weak") == weak
    assert reward_from(captioner.eyes, words_and_owners(captioner.eyes.tokenizer), older, Path("older.pt")).weak == WEAK


def test_words_that_the_model_does_not_know(captioner, scenes):
    word = captioner.audit(scenes[0], "a zebra on snow").words[1]
    assert (word.word, word.confidence, word.suspicion, word.instead) == ("zebra", None, 0.0, "")
    with pytest.raises(ValueError, match="no caption to look at"):
        captioner.audit(scenes[0], " . ")
    with pytest.raises(ValueError, match="needs a reward model"):
        Captioner(captioner.eyes, captioner.model, None, captioner.plan).refine(scenes[0], "a star")
    assert Captioner(captioner.eyes, captioner.model, None, captioner.plan).audit(scenes[0], "a star").reward is None
    long = "a star and " * 20 + "a heart"
    assert captioner.refine(scenes[0], long, weak=0.0).text.endswith("a heart")


def test_texts_by_hand(captioner):
    draft = read_draft(captioner.eyes.tokenizer, "A red, Circle on snow.", 20)
    assert [draft.text[a:b] for a, b in draft.spans] == ["A", "red", "Circle", "on", "snow"] and draft.tokens(1, 2) == (1, 3)
    assert spliced(draft, (1, 2), ["blue", "circle"]) == "A blue, Circle on snow."
    assert spliced(draft, (0, 2), ["two", "red", "stars"]) == "Two red, Stars on snow."
    assert spliced(draft, (1, 2), ["star"]) == "A star on snow."
    pieces = Draft("playing ball", [1, 2, 3], [0, 0, 1], [(0, 7), (8, 12)])
    assert pieces.tokens(0, 0) == (0, 2) and spliced(pieces, (0, 0), ["kicking"]) == "kicking ball"
    assert diff("a red circle", "a blue circle on snow") == "a [-red-] {+blue+} circle {+on+} {+snow+}"
    assert changed("a red circle", "a blue circle on snow") == 3 and changed("a", "a") == 0


def test_even_dials_change_nothing(captioner, scenes):
    seen = captioner.look(scenes[0])
    x0, length = torch.randint(2, 20, (6, 8)), torch.tensor([8, 7, 3, 5, 8, 1])
    members = captioner.reward.members(x0, length, seen.tokens, seen.joint)
    total = members[..., 0]
    low = total.mean(0) - captioner.reward.pessimism * total.std(0, correction=0)
    want = 4.0 * torch.tanh((low - captioner.reward.base[0]) / captioner.reward.base[1] / 4.0)
    assert torch.equal(captioner.reward.score(x0, length, seen.tokens, seen.joint), want)
    assert EVEN.weights.tolist() == [1, 0, 0, 0] and Dials(2.0, 1.0, 0.5).weights.tolist() == [1, 1, 0, -0.5]
    for wrong in (-1.0, float("nan"), float("inf"), 1e300):
        with pytest.raises(ConfigError, match="count from 0 to 100 times"):
            Dials(wrong)


def test_dials_choose_among_candidates_and_repairs(smoke, scenes):
    """With specificity taught to be the total's opposite, turning it up chooses what is liked least."""
    captioner = Captioner.from_pretrained(smoke / "models/smoke")
    assert captioner.reward is not None
    captioner.reward.linear[..., 3] = -3 * captioner.reward.linear[..., 0]
    free = captioner(scenes, candidates=6, temperature=1.0)
    captioner.dials = Dials(specificity=2.0)
    turned = captioner(scenes, candidates=6, temperature=1.0)
    texts = [[captioner.refine(scene, text, weak=0.0).text for text in TEXTS] for scene in scenes]
    captioner.dials = EVEN
    totals = [[captioner.audit(scene, c.text).reward for scene, c in zip(scenes, found, strict=True)] for found in (free, turned)]
    assert all(a > b for a, b in zip(*totals, strict=True))
    assert texts != [[captioner.refine(scene, text, weak=0.0).text for text in TEXTS] for scene in scenes]


def test_tables_of_drafts(run, capsys):
    drafts(2)
    rows = [json.loads(line) for line in Path("drafts.jsonl").read_text().splitlines()]
    with Path("d.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("file_name", "text"), *((r["image"], r["caption"]) for r in rows), ("", "x")])
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"image": "0.png", "captions": [rows[0]["caption"], "b"]}]), "d.parquet")
    held = [{"image": {"bytes": Path("0.png").read_bytes(), "path": None}, "text": "a star"}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(held), "held.parquet")
    Path("0.txt").write_text("one\n\n two\n")
    keys = [(row["image"], row["caption"]) for row in rows]
    assert [i.key for i in find_drafts("drafts.jsonl", False, "", "", ".txt")] == keys
    assert [i.key for i in find_drafts("d.csv", False, "", "", ".txt")] == [*keys, ("d.csv/4", "x")]  # a row without an image will fail
    assert [i.draft for i in find_drafts("d.parquet", False, "", "", ".txt")] == [keys[0][1], "b"]
    assert [i.key for i in find_drafts("held.parquet", False, "", "", ".txt")] == [("held.parquet/0", "a star")]
    assert [i.key for i in find_drafts(".", False, "", "", ".txt")] == [("0.png", "one"), ("0.png", "two")]
    with pytest.raises(ConfigError, match="no column of captions among image, note; --caption-column"):
        Path("e.jsonl").write_text('{"image": "0.png", "note": "x"}\n')
        find_drafts("e.jsonl", False, "", "", ".txt")
    Path("f.jsonl").write_text('{"image": "0.png", "caption": "a star"}\n{"image": "1.png", "note": "x"}\n{"text": "a"}\n')
    assert [i.key for i in find_drafts("f.jsonl", False, "", "", ".txt")] == [("0.png", "a star"), ("1.png", ""), ("f.jsonl/2", "a")]
    Path("n.jsonl").write_text('{"image": "0.png", "caption": []}\n')
    assert [i.key for i in find_drafts("n.jsonl", False, "", "", ".txt")] == [("0.png", "")]
    assert run("--refine", "f.jsonl", "--output", "f.json") == 3
    errors = [row["error"] for row in json.loads(Path("f.json").read_text())]
    assert errors == [None, "1.png: no caption to look at", "f.jsonl/2: no image in this row"]
    Path("u.jsonl").write_text('{"image": "0.png", "caption": "a\u2028b"}\r\n', encoding="utf-8")  # a line end within a text
    assert [i.draft for i in find_drafts("u.jsonl", False, "", "", ".txt")] == ["a\u2028b"]


@pytest.mark.parametrize("row", ['{"image": "0.png", "capt', '["0.png", "a star"]', "7"])
def test_a_row_that_is_none_is_told_by_its_line(run, capsys, row):
    Path("l.jsonl").write_text(f'{{"image": "0.png", "caption": "a"}}\n\n{row}\n')
    assert run("--refine", "l.jsonl") == run("l.jsonl") == 2
    assert capsys.readouterr().err == "error: l.jsonl: line 3 is not a JSON object\n" * 2


def test_refining_a_table_is_a_job_like_any_other(run, capsys):
    drafts(3)
    with Path("drafts.jsonl").open("a") as file:
        file.write('{"image": "gone.png", "caption": "a star"}\n{"image": "0.png", "caption": null}\n')
    assert run("--refine", "drafts.jsonl", "--output", "o.jsonl", "--weak", "0") == 3
    told = capsys.readouterr()
    assert "6 captions in o.jsonl" in told.out and "failed: gone.png: no such file" in told.err and "0.png: no caption" in told.err
    rows = [json.loads(line) for line in Path("o.jsonl").read_text().splitlines()]
    given = [json.loads(line) for line in Path("drafts.jsonl").read_text().splitlines()]
    assert [(r["image"], r["draft"]) for r in rows[:6]] == [(r["image"], r["caption"]) for r in given[:6]]
    changed_ = [r for r in rows[:6] if r["caption"] != r["draft"]]
    assert f"{len(changed_)} captions repaired" in told.out and all(r["reward"] > r["draft_reward"] for r in changed_)
    assert run("--refine", "drafts.jsonl", "--output", "o.jsonl", "--weak", "0", "--batch-size", "1") == 3
    assert "6 done before" in capsys.readouterr().out
    for name in ("o.csv", "o.parquet"):
        for shard in ("1/2", "2/2"):
            run("--refine", "drafts.jsonl", "--output", name, "--weak", "0", "--shard", shard)
    assert pyarrow.parquet.read_table("o.parquet").to_pylist() == rows
    with Path("o.csv").open(newline="") as file:
        assert [r["caption"] for r in csv.DictReader(file)] == [r["caption"] or "" for r in rows]


def test_an_audit_ranks_and_changes_nothing(run, capsys):
    drafts(3)
    assert run("--refine", "drafts.jsonl", "--report-only", "--output", "o.jsonl") == 0
    rows = [json.loads(line) for line in Path("o.jsonl").read_text().splitlines()]
    assert [r["suspicion"] for r in rows] == sorted((r["suspicion"] for r in rows), reverse=True) and len(rows) == 6
    assert all(r["caption"] == r["draft"] and r["suspicion"] == max(w["suspicion"] for w in r["words"]) for r in rows)
    told = capsys.readouterr().out
    assert "most suspicious captions" in told
    assert run("--refine", "drafts.jsonl", "--report-only") == 0
    assert capsys.readouterr().out in told


def test_drafts_in_text_files_stay_as_they_are(run, capsys):
    drafts(1)
    Path("0.txt").write_text(TEXTS[0] + "\n")
    assert run("--refine", ".", "--format", "txt") == 2
    assert capsys.readouterr().err == "error: --refine --format txt needs --output FOLDER: drafts stay as they are\n"
    assert run("--refine", ".", "--format", "txt", "--output", "out", "--weak", "0") == 0
    assert Path("0.txt").read_text() == TEXTS[0] + "\n" and Path("out/0.txt").read_text()[0] == "A"
    assert run("--refine", "drafts.jsonl", "--format", "txt", "--output", "out") == 2
    assert "two captions of 0.png would share out/0.txt" in capsys.readouterr().err


def test_what_the_command_refuses(run, capsys):
    drafts(1)
    assert run("0.png", "--specificity", "2") == 2
    assert "with --candidates or --refine" in capsys.readouterr().err
    for wrong in (("0.png", "--refine", "drafts.jsonl"), ("0.png", "--report-only")):
        with pytest.raises(SystemExit):
            run(*wrong)
    assert run("0.png", "--candidates", "2", "--specificity", "2") == 0
