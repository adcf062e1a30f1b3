"""Networks against the published ones (names, shapes, outputs), and the contract they all keep."""

import copy

import pytest
import torch
import torchvision
from reference_fill import fill, fill_value, load_reference, noise
from torch import nn

import models
from datafree.hooks import features_of
from models import GENERATORS, MODELS, SEGMENTERS, UpsampleConv2d, get_generator, get_model, get_segmenter, input_size
from models.lenet import PUBLISHED_NAMES

MMRAZOR = load_reference("mmrazor")["architectures"]
REFERENCE = load_reference("architectures")["architectures"] | MMRAZOR

# Reference entry: name in MODELS. Entries not named here are their registry name after "fast/".
CLASSIFIERS = {
    "fast/vgg11_64px": "vgg11",
    "fast/resnet18_100": "resnet18",
    "fast/wrn16_2_100": "wrn16_2",
    "dfad/LeNet5": "lenet5",
    "dfad/LeNet5Half": "lenet5_half",
    "dfad/caltech101_teacher": "resnet34_imagenet",
    "dfad/caltech101_student": "resnet18_imagenet",
}
IMAGE_GENERATORS = {
    "fast/Generator_nz256": "fast",
    "fast/Generator_nz512": "fast",
    "fast/Generator_small": "fast",
    "fast/DeepGenerator": "deep",
    "fast/DCGAN_Generator": "dcgan",
    "cmi/LargeGenerator_nz256": "cmi_large",
    "dfad/GeneratorA_nz100_nc1": "generator_a",
    "dfad/GeneratorA_nz256_nc3": "generator_a",
    "dfad/GeneratorB_img64": "generator_b",
    "dfad/GeneratorB_img128": "generator_b",
    "dafl/Generator_latent100_ch1": "dafl",
    "dafl/Generator_latent1000_ch3": "dafl",
    "mmrazor/DAFLGenerator_latent1000": "dafl",
    "mmrazor/DAFLGenerator_latent256_eps1e-5": "generator_a",
    "mmrazor/ZSKTGenerator_latent256": "zskt",
}
SEGMENTATION = {
    "dfad/deeplabv3_resnet50": "deeplabv3_resnet50",
    "dfad/deeplabv3_mobilenet": "deeplabv3_mobilenet",
    "dfad/deeplabv3_mobilenet_13": "deeplabv3_mobilenet",
    "dfad/SegNetVgg13": "segnet_vgg13",
    "dfad/SegNetVgg16": "segnet_vgg16",
    "dfad/SegNetVgg19": "segnet_vgg19",
}
for entry in REFERENCE:
    if entry not in CLASSIFIERS.keys() | IMAGE_GENERATORS.keys() | SEGMENTATION.keys():
        CLASSIFIERS[entry] = entry.removeprefix("fast/")

# The published code has no such networks: DAFL gives only their sizes, and deeper VGGs are ours.
UNPUBLISHED = {
    "hintonnet": (2395210, 1200),
    "hintonnet_half": (1276810, 800),
    "alexnet": (57044810, 4096),
    "alexnet_half": (14279594, 2048),
    "vgg16": (14728266, 512),
    "vgg19": (20040522, 512),
}

NZ, SMALL_NGF = 12, 4
GENERATOR_SIZE = {"generator_b": 32, "dcgan": 32, "deep": 32}


def small_generator(name, channels=3):
    size = GENERATOR_SIZE.get(name, 8)
    return get_generator(name, NZ, img_size=size, channels=channels, ngf=SMALL_NGF)


def reference_model(entry):
    return get_model(CLASSIFIERS[entry], REFERENCE[entry]["state_dict"][-1][1][0])


def reference_generator(entry):
    given = REFERENCE[entry]["constructor_args"]
    return get_generator(
        IMAGE_GENERATORS[entry],
        given.get("nz", given.get("latent_dim")),
        img_size=given["img_size"],
        channels=given.get("nc", given.get("channels", 3)),
        ngf=given.get("ngf", given.get("hidden_channels", 128) // 2),
    )


def names_and_shapes(module):
    return [[name, list(v.shape)] for name, v in module.state_dict().items()]


def fill_as(module, published):
    """Fill `module` by the rule, for the published [name, shape] of its entries, in order."""
    assert [shape for _, shape in published] == [shape for _, shape in names_and_shapes(module)]
    values = (fill_value(name, shape) for name, shape in published)
    module.double().load_state_dict(dict(zip(module.state_dict(), values, strict=True)))
    return module.eval()


def close(actual, expected):
    assert torch.as_tensor(actual).tolist() == pytest.approx(expected, rel=1e-7, abs=1e-9)


def compare(actual, expected):
    """An output with its block of the reference; `actual` float64."""
    assert list(actual.shape) == expected["shape"]
    close(actual.sum(), expected["sum"])
    close(actual.mean(), expected["mean"])
    close(actual.norm(), expected["l2"])
    for row, values in zip(actual, expected.get("values", []), strict=False):
        close(row, values)
    for row, values in zip(actual, expected.get("first10_per_sample", []), strict=False):
        close(row.flatten()[:10], values)
    for row, values in zip(actual, expected.get("channel_means_per_sample", []), strict=False):
        close(row.mean((1, 2)), values)


@pytest.mark.parametrize("entry", SEGMENTATION)
def test_segmentation_network(entry):
    reference = REFERENCE[entry]
    classes = reference["constructor_args"]["num_classes"]
    network = get_segmenter(SEGMENTATION[entry], classes)
    assert names_and_shapes(network) == reference["state_dict"]
    trained = sum(p.numel() for p in network.parameters())
    assert trained == reference["num_parameters"]
    with torch.no_grad():
        logits = fill(network)(noise(reference["input_shape"], reference["input_seed"]))
    assert list(logits.shape) == [2, classes, 64, 64]
    if reference["values_in_this_file"]:
        compare(logits, reference["output"])


def test_every_registered_network_is_tested():
    assert set(SEGMENTATION.values()) == set(SEGMENTERS)
    assert set(CLASSIFIERS.values()) | UNPUBLISHED.keys() == set(MODELS)
    assert set(IMAGE_GENERATORS.values()) == set(GENERATORS)


@pytest.mark.parametrize("entry", CLASSIFIERS)
def test_classifier_agrees_with_published(entry):
    expected = REFERENCE[entry]
    model = reference_model(entry)
    if entry in ("fast/lenet5", "fast/lenet5_half"):
        shapes = dict(expected["state_dict"])
        model.double().eval()
        model.load_state_dict({name: fill_value(name, shape) for name, shape in shapes.items()})
        assert list(shapes.values()) == [shape for _, shape in names_and_shapes(model)]
    else:
        assert names_and_shapes(model) == expected["state_dict"]
    assert sum(p.numel() for p in model.parameters()) == expected["num_parameters"]
    if not expected["values_in_this_file"]:
        return
    if "lenet5" not in entry:
        fill(model)
    with torch.no_grad():
        x = noise(expected["input_shape"], expected["input_seed"])
        with features_of(model) as features:
            logits = model(x)
    compare(logits, expected["output"])
    compare(features[0], expected["features"])


@pytest.mark.parametrize("entry", IMAGE_GENERATORS)
def test_generator_agrees_with_published(entry):
    expected = REFERENCE[entry]
    generator = reference_generator(entry)
    assert entry in MMRAZOR or names_and_shapes(generator) == expected["state_dict"]
    fill_as(generator, expected["state_dict"])
    assert sum(p.numel() for p in generator.parameters()) == expected["num_parameters"]
    assert list(generator.latents(expected["latent_shape"][0]).flatten(1).shape) == list(
        torch.empty(expected["latent_shape"]).flatten(1).shape
    )
    eps = [m.eps for m in generator.modules() if isinstance(m, nn.BatchNorm2d)]
    assert eps == [eps for _, eps in expected.get("batch_norm_eps", [(None, 1e-5)] * len(eps))]
    if not expected["values_in_this_file"]:
        return
    z = noise(expected["latent_shape"], expected["latent_seed"])
    with torch.no_grad():
        compare(generator(z), expected["output_eval"])
        compare(generator.train()(z), expected["output_train"])
    statistics = expected["running_statistics_after_one_train_forward"]
    buffers = dict(generator.named_buffers())
    for kind in ("running_mean", "running_var"):
        values = torch.cat([v for name, v in buffers.items() if name.endswith(kind)])
        close(values.sum(), statistics[f"{kind}_sum"])
        close(values.norm(), statistics[f"{kind}_l2"])
    steps = sum(v for name, v in buffers.items() if name.endswith("num_batches_tracked"))
    assert steps == statistics["num_batches_tracked_total"]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", MODELS)
def test_features_are_the_input_of_the_classifier(name, channels):
    model = get_model(name, num_classes=7, channels=channels).eval()
    side = input_size(name) or (63 if name.startswith("alexnet") else 32)
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
    # LeNet's features are taken where its convolutions end, two linear layers before the logits.
    first = linear[0 if name.startswith("lenet") else -1]
    seen = []
    first.register_forward_hook(lambda _module, given, _output: seen.append(given[0]))
    x = torch.randn(2, channels, side, side)
    with torch.no_grad():
        with features_of(model) as features:
            logits = model(x)
        assert torch.equal(model(x), logits)
    assert logits.shape == (2, 7)
    assert features[0].shape == (2, first.in_features)
    assert torch.equal(seen[0], features[0])


@pytest.mark.parametrize("name", UNPUBLISHED)
def test_sizes_of_networks_without_a_published_module(name):
    parameters, width = UNPUBLISHED[name]
    model = get_model(name)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert [m for m in model.modules() if isinstance(m, nn.Linear)][-1].in_features == width


def test_alexnet_is_torchvisions():
    model, theirs = get_model("alexnet").eval(), torchvision.models.alexnet(num_classes=10).eval()
    model.load_state_dict(theirs.state_dict())
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model(x), theirs(x))


def test_published_channels_and_input_sizes():
    assert input_size("lenet5") == input_size("lenet5_half") == 32
    assert input_size("hintonnet") == input_size("hintonnet_half") == 28
    assert input_size("wrn40_2") is None
    assert get_model("lenet5").conv1.in_channels == 1
    assert get_model("wrn16_1").conv1.in_channels == 3


@pytest.mark.parametrize("lookup", [get_model, input_size, lambda name: get_generator(name, 8)])
def test_unknown_names_are_refused_in_one_line(lookup):
    for name in ("resnet19", "generatr_a", "zzz"):
        with pytest.raises(ValueError, match=name) as caught:
            lookup(name)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="resnet18"):
        get_model("resnet19")


def test_a_network_of_ones_own_is_registered_by_one_call(monkeypatch):
    class MyNet(nn.Linear):
        input_size = 6

        def __init__(self, num_classes=10, channels=3, side=5):
            super().__init__(channels * side**2, num_classes)

    with pytest.raises(ValueError, match="'resnet18' is taken"):
        models.register("resnet18", MyNet)
    monkeypatch.setitem(MODELS, "my_net", None)  # so that the test leaves no trace
    del MODELS["my_net"]
    models.register("my_net", MyNet, side=6)
    assert get_model("my_net", 7, channels=1).weight.shape == (7, 36)
    assert models.agree_on_size(["resnet18", "my_net"]) == 6


@pytest.mark.parametrize("prefix", ["", "net."])
def test_lenet_loads_both_published_namings(prefix):
    source, target = get_model("lenet5"), copy.deepcopy(get_model("lenet5"))
    other = {new: old for old, new in PUBLISHED_NAMES.items()}
    state = {}
    for name, value in source.state_dict().items():
        layer, kind = name.split(".")
        state[prefix + other[f"{layer}."] + kind] = value
    (nn.ModuleDict({"net": target}) if prefix else target).load_state_dict(state)
    assert all(map(torch.equal, source.parameters(), target.parameters()))
    assert any(name.endswith("features.0.weight") for name in state)


@pytest.mark.parametrize("name", ["wrn16_1", "mobilenetv2", "lenet5"])
def test_seed_decides_the_weights(name):
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        states.append(get_model(name, channels=2).state_dict())
    assert all(torch.equal(a, b) for a, b in zip(*map(dict.values, states), strict=True))


def test_vgg_fourth_pool_is_for_64_pixels_alone():
    model, sides = get_model("vgg8").eval(), []
    model.block4.register_forward_hook(lambda _module, _given, y: sides.append(y.shape[2]))
    for side in (32, 64, 96):
        model(torch.zeros(1, 3, side, side))
    assert sides == [4, 4, 12]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", GENERATORS)
def test_generator_contract(name, channels):
    generator = small_generator(name, channels)
    assert generator.nz == NZ
    z = generator.latents(3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(z, generator.latents(3, generator=torch.Generator().manual_seed(0)))
    images = generator(z)
    assert images.shape == (3, channels, generator.img_size, generator.img_size)
    assert images.is_contiguous(memory_format=torch.channels_last)
    if z.dim() == 2:
        assert torch.equal(generator.eval()(z), generator(z[:, :, None, None]))


@pytest.mark.parametrize("name", ["generator_a", "dafl", "fast", "cmi_large"])
def test_generator_makes_mnist_size(name):
    generator = get_generator(name, NZ, img_size=28, channels=1, ngf=SMALL_NGF)
    assert generator(generator.latents(2)).shape == (2, 1, 28, 28)


@pytest.mark.parametrize("name", GENERATORS)
def test_generator_refuses_other_sizes(name):
    with pytest.raises(ValueError, match="multiple of"):
        get_generator(name, NZ, img_size=30)


def with_gradients(generator, z):
    """Images, and gradients of a weighted sum of them, by latents and by every parameter."""
    z = z.clone().requires_grad_()
    wanted = {"z": z} | {k: p for k, p in generator.named_parameters() if p.requires_grad}
    images = generator(z)
    weights = noise(images.shape, 2)
    return images, dict(zip(wanted, torch.autograd.grad((images * weights).sum(), wanted.values()), strict=True))


@pytest.mark.parametrize("name", ["generator_a", "dafl", "fast", "deep", "cmi_large", "zskt"])
def test_folded_upsampling_is_exact(name):
    generator = fill(small_generator(name)).train()
    z = generator.latents(3).double()
    assert sum(isinstance(m, UpsampleConv2d) for m in generator.modules()) >= 2
    folded, folded_gradients = with_gradients(generator, z)
    models.set_folded(generator, False)
    plain, gradients = with_gradients(generator, z)
    torch.testing.assert_close(folded, plain, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(folded_gradients, gradients, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_folded_layer_alone(memory_format):
    layer = fill(UpsampleConv2d(5, 4)).to(memory_format=memory_format)
    x = noise((2, 5, 3, 6), 0).to(memory_format=memory_format).requires_grad_()

    def first_and_second_order(folded):
        y = models.set_folded(layer, folded)(x)
        wanted = [x, layer.weight, layer.bias]
        first = torch.autograd.grad((y**3).sum(), wanted, create_graph=True)
        return y, first, torch.autograd.grad(sum((g**2).sum() for g in first), wanted)

    torch.testing.assert_close(first_and_second_order(True), first_and_second_order(False), rtol=1e-10, atol=1e-10)


def test_folded_layer_under_bfloat16_autocast():
    torch.manual_seed(0)
    layer = UpsampleConv2d(8, 8)
    x = torch.randn(2, 8, 6, 6)
    with torch.no_grad():
        exact = layer(x)
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), exact, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("name", ["generator_a", "dafl"])
def test_generator_on_a_basis_is_exact(name):
    """Many short latents take another way to the same images, gradients and statistics."""
    generator = fill(get_generator(name, 3, 16, 1, ngf=4)).train()
    twin = models.set_folded(copy.deepcopy(generator), False)
    z = noise((12, 3), 1)
    convolved = []
    generator.conv_blocks1[0].register_forward_hook(lambda *_: convolved.append(True))
    fast, fast_gradients = with_gradients(generator, z)
    plain, gradients = with_gradients(twin, z)
    assert not convolved  # it went by the basis
    torch.testing.assert_close(fast, plain, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(fast_gradients, gradients, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(generator.state_dict(), twin.state_dict(), rtol=1e-12, atol=1e-12)
