"""The classes of ImageNet and the keys of its images."""

import pytest

from zpipe.pipeline.imagenet_names import canonical_key, labels, synsets, wnids, wnids_of


def test_the_classes_are_the_sorted_wnids_and_each_has_a_number_of_the_development_kit():
    assert len(wnids()) == 1000 and list(wnids()) == sorted(set(wnids()))
    assert sorted(synset.ilsvrc2012_id for synset in synsets()) == list(range(1, 1001))
    assert [labels()[wnid] for wnid in ("n01440764", "n02119789", "n15075141")] == [0, 278, 999]


def test_published_numbers_of_the_development_kit():
    # The first ten lines of ILSVRC2012_validation_ground_truth.txt, and the classes of these images.
    numbers = (490, 361, 171, 822, 297, 482, 13, 704, 599, 164)
    expected = (65, 970, 230, 809, 516, 57, 334, 415, 674, 332)
    label_of = {synset.ilsvrc2012_id: label for label, synset in enumerate(synsets())}
    assert tuple(label_of[number] for number in numbers) == expected


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("n01440764_10026.JPEG", "n01440764_10026"),
        ("train/n01440764/n01440764_10026.JPEG", "n01440764_10026"),
        ("n01440764_10026_n01440764.JPEG", "n01440764_10026"),
        ("ILSVRC2012_val_00000293.JPEG", "ILSVRC2012_val_00000293"),
        ("ILSVRC2012_val_00000293_n01440764.JPEG", "ILSVRC2012_val_00000293"),
        ("ILSVRC2012_test_00000001", "ILSVRC2012_test_00000001"),
        ("n02105855_2933.jpg", "n02105855_2933"),
        ("my.photo_n01440764.jpg", "my_photo_n01440764"),
        ("n01440764_10026_n0144076.JPEG", "n01440764_10026_n0144076"),
    ],
)
def test_an_image_has_one_key_in_all_packagings(name, key):
    assert canonical_key(name) == canonical_key(key) == key


def test_class_names_are_recognised_by_position():
    names = [synset.name for synset in synsets()]
    assert wnids_of(names) == wnids_of(wnids()) == wnids()
    hugging_face = list(names)
    hugging_face[517] = "crane2"
    assert names[134] == names[517] == "crane" and wnids_of(hugging_face) == wnids()
    assert wnids_of([name.partition(",")[0].replace(" ", "_").upper() for name in names]) == wnids()
    assert wnids_of([names[1], names[0], *names[2:]]) is None
    assert wnids_of(names[:999]) is None and wnids_of([]) is None
