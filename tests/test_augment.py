"""The batched augmentation has the distribution of torchvision's transforms."""

from collections import Counter

import torch
from torchvision.transforms import v2

from datafree.augment import Transform, random_crop, random_flip, random_resized_crop


def counts(images):
    return Counter(bytes(i.flatten().tolist()) for i in images)


def assert_same_distribution(ours, theirs):
    """Two-sample chi-square over the distinct images, far from its 1e-6 quantile."""
    a, b = counts(ours), counts(theirs)
    assert a.keys() == b.keys()
    statistic = sum((a[k] - b[k]) ** 2 / (a[k] + b[k]) for k in a)
    degrees = len(a) - 1
    assert statistic < degrees + 5 * (2 * degrees) ** 0.5 + 10, (statistic, degrees)


def test_crop_is_torchvisions():
    torch.manual_seed(0)
    image = torch.arange(1, 26, dtype=torch.uint8).view(1, 5, 5)
    crop = v2.RandomCrop(5, padding=2)
    n = 5000
    assert_same_distribution(random_crop(image.expand(n, 1, 5, 5), 2), [crop(image) for _ in range(n)])


def test_flip_is_torchvisions():
    torch.manual_seed(0)
    image = torch.arange(6, dtype=torch.uint8).view(1, 2, 3)
    flip = v2.RandomHorizontalFlip()
    assert_same_distribution(random_flip(image.expand(1000, 1, 2, 3)), [flip(image) for _ in range(1000)])


def test_resized_crop_is_torchvisions():
    """The same boxes as often as there, and of the same box the same image."""
    torch.manual_seed(0)
    n, area = 4000, 0.6
    # Bilinear in its coordinates, so that a crop's corners tell its box.
    ramp = torch.stack(torch.meshgrid(torch.arange(6.0), torch.arange(6.0), indexing="ij"))
    crops = random_resized_crop(ramp.expand(n, 2, 6, 6), area)
    boxes = []
    for _ in range(n):
        top, left, height, width = v2.RandomResizedCrop(6, (area, 1)).make_params([ramp]).values()
        boxes.append((top, left, height, width))
    corners = torch.tensor([(a, b, a + h - 1, b + w - 1) for a, b, h, w in boxes])
    ours = torch.stack([crops[:, 0, 0, 0], crops[:, 1, 0, 0], crops[:, 0, -1, 0], crops[:, 1, 0, -1]], dim=1)
    assert torch.allclose(ours, ours.round(), atol=1e-4)
    assert_same_distribution(ours.round().to(torch.uint8), corners.to(torch.uint8))
    image = torch.rand(2, 6, 6)
    crops = random_resized_crop(torch.cat([ramp, image]).expand(20, 4, 6, 6), area)
    for crop in crops:
        (top, bottom), (left, right) = ((int(c.min().round()), int(c.max().round()) + 1) for c in crop[:2])
        resized = v2.functional.resize(image[:, top:bottom, left:right], [6, 6])
        assert torch.allclose(crop[2:], resized, atol=1e-5)


def test_resized_crop_of_bytes_and_gradients():
    x = torch.randint(256, (3, 1, 8, 8), dtype=torch.uint8)
    transform = Transform((0,), (1,), padding=2, area=0.5)
    torch.manual_seed(0)
    crops = transform(x, train=True)
    torch.manual_seed(0)
    assert torch.allclose(crops * 255, random_resized_crop(x, 0.5))
    assert torch.equal(transform(x), x / 255)
    y = torch.rand(2, 1, 6, 6, dtype=torch.float64, requires_grad=True)

    def cropped(y):
        torch.manual_seed(3)
        return random_resized_crop(y, 0.5)

    assert torch.autograd.gradcheck(cropped, (y,))


def test_images_of_a_batch_are_cropped_apart_and_keep_their_channels():
    torch.manual_seed(0)
    images = torch.arange(2 * 3 * 16, dtype=torch.uint8).view(2, 3, 4, 4).repeat(50, 1, 1, 1)
    crops = random_crop(images, 1)
    assert len(counts(crops[::2])) == 9 and len(counts(crops[1::2])) == 9
    inside = crops[:, :, 1:3, 1:3].int()
    assert (inside[:, 1] - inside[:, 0] == 16).all() and (inside[:, 2] - inside[:, 1] == 16).all()


def test_crop_and_flip_pass_gradients():
    x = torch.rand(4, 1, 6, 6, dtype=torch.float64, requires_grad=True)

    def augmented(x):
        torch.manual_seed(3)
        return random_flip(random_crop(x, 2))

    assert torch.autograd.gradcheck(augmented, (x,))


def test_transform_normalises_like_torchvision():
    mean, std = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
    x = torch.randint(256, (4, 3, 8, 8), dtype=torch.uint8)
    transform = Transform(mean, std, padding=4, flip=True)
    expected = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)])(x)
    assert torch.allclose(transform(x), expected, atol=1e-6)
    assert transform(x).is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(transform.denormalize(transform(x)), x / 255, atol=1e-6)
    torch.manual_seed(0)
    assert not torch.equal(transform(x, train=True), transform(x))


def test_train_without_augmentation_is_test():
    x = torch.randint(256, (4, 1, 8, 8), dtype=torch.uint8)
    transform = Transform((0.5,), (0.5,))
    assert torch.equal(transform(x, train=True), transform(x))
