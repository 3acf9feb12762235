"""Pieces of caption groups with foreign contents: planted ones, natural ones, and the dictionary
that reads.
"""

import numpy as np
import pytest
import torch
from detection.test_reference_reading import draw_reader, show_captions

from bezoar import registry
from bezoar.detection import foreign_pieces, patch_dictionary, shared_causes
from bezoar.detection.foreign_pieces import PieceSearch
from bezoar.detection.patch_dictionary import PatchDictionary
from bezoar.detection.reference_reading import UNREAD, Content
from bezoar.detection.shared_causes import Cause, Discriminants


def prepare_search(is_attacked):
    """2,400 records of 6 groups, 100 of group 0 with features of their own; which they are.

    Attacked: their contents are of any kind. Otherwise they are those of their captions.
    """
    reader, group, poisons = draw_reader()
    if not is_attacked:
        reader = show_captions(reader, group, poisons)
    random = torch.Generator().manual_seed(1)
    content = group.clone()
    content[poisons] = torch.arange(len(poisons)) % 6
    features = torch.randn(len(group), 60, generator=random)
    features += 0.2 * torch.randn(6, 60, generator=random)[content]
    features[poisons, :3] += 6
    discriminants = Discriminants.fit(features - features.mean(0), group, reader.half)
    return PieceSearch.prepare(reader, discriminants, 0.15, 0), group, poisons


@pytest.mark.parametrize("is_attacked", [True, False])
def test_a_planted_trigger_is_believed_and_no_natural_piece(is_attacked):
    search, group, poisons = prepare_search(is_attacked)
    findings = search.find(group, [])
    causes = findings.causes
    assert {cause.group for cause in causes} == ({0} if is_attacked else set())
    assert findings.tested >= len(causes)
    if not is_attacked:
        return
    shown = shared_causes.mark_shown(causes, len(group)).nonzero()[:, 0]
    assert torch.isin(poisons, shown).float().mean() > 0.9
    assert torch.isin(shown, poisons).float().mean() > 0.95
    assert (findings.doubt[poisons] > 0.6).float().mean() > 0.9
    assert not search.find(group, causes).causes


def test_what_a_whole_piece_shows_is_believed_where_contents_are_hard_to_tell(monkeypatch):
    monkeypatch.setattr(foreign_pieces, "DEVIATIONS", 6.0)
    search, group, poisons = prepare_search(True)
    shown = shared_causes.mark_shown(search.find(group, []).causes, len(group))
    assert shown[poisons].float().mean() > 0.9 and shown.sum() < 110
    monkeypatch.setattr(foreign_pieces, "SHARED_BY_ALL", 2.0)
    assert not search.find(group, []).causes


def test_contents_are_foreign_by_their_bound_or_where_all_show_one_thing():
    assert foreign_pieces.is_foreign(Content(0.1, 0.09), 0.3)
    assert not foreign_pieces.is_foreign(Content(0.1, 0.1), 0.89)
    assert foreign_pieces.is_foreign(Content(0.3, 0.2), 0.9)
    assert not foreign_pieces.is_foreign(Content(0.3, 0.23), 1.0), "as natural ones may be"
    assert not foreign_pieces.is_foreign(Content(0.41, 0.01), 1.0)
    assert not foreign_pieces.is_foreign(UNREAD, 1.0)


def test_the_piece_that_holds_the_poisons_is_chosen_and_what_is_found_is_not():
    search, group, poisons = prepare_search(True)
    assert set(search.cut_groups(group, 2).tolist()) == {0, 1}
    for seeds in search.find_seeds(group, 2, []):
        assert seeds[poisons].float().mean() > 0.9
        assert not (seeds & (group != 0)).any()
    rows = (group == 0).nonzero()[:, 0]
    found = Cause(0, 1.0, rows, torch.isin(rows, poisons).float())
    for seeds in search.find_seeds(group, 2, [found]):
        assert not seeds[poisons].any()


def test_filters_are_whitened_patches_of_the_images():
    images = registry.make("data", "scenes:count=60,seed=3")().images
    dictionary = PatchDictionary.learn(images, 0)
    patches = torch.cat([patch_dictionary.cut_patches(part, 1) for part in images.split(20)])
    assert patches.shape == (60, 27 * 27, 108)
    assert patches.mean(2).abs().max() < 1e-4 and patches.var(2).max() < 1.02
    answers = patches.flatten(0, 1) @ dictionary.filters - dictionary.shift
    # A filter answers best to the patch that it was made of; whitened answers have about one
    # variance.
    assert answers.amax(0).min() > 3 and 0.2 < float(answers.std()) < 2
    plain = torch.cat([(answers - 0.5).relu(), (-answers - 0.5).relu()], 1).unflatten(
        0, (60, 27, 27)
    )
    plain = plain[:, ::2, ::2]  # (60, 14, 14, 200)
    quarters = [plain[:, i : i + 7, j : j + 7].mean((1, 2)) for i in (0, 7) for j in (0, 7)]
    expected = torch.stack(quarters, 2).flatten(1)
    assert torch.allclose(dictionary.encode_images(images), expected, atol=1e-4)


def test_a_colour_cast_says_nothing_and_neither_does_the_size():
    images = registry.make("data", "scenes:count=30,seed=3")().images
    dictionary = PatchDictionary.learn(images, 0)
    vectors = dictionary.encode_images(images)
    cast = (images.float() * torch.tensor([0.7, 0.9, 0.6])[:, None, None] + 20).round().byte()
    moved = (dictionary.encode_images(cast) - vectors).norm(dim=1) / vectors.norm(dim=1)
    assert moved.median() < 0.15
    larger = torch.from_numpy(np.kron(images.numpy(), np.ones((1, 1, 2, 2), np.uint8)))
    assert dictionary.encode_images(larger).shape == vectors.shape
