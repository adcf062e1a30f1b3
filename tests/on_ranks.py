"""A plugin of pytest (-p on_ranks) for torchrun: networks that tests make take the rank's share of what they are given.

A generator takes its share of the latents, the others are what a Session makes of them: the reference numbers must come
out on several ranks as they do in one process.
"""

import functools

import models
from datafree import distributed


def _share_latents(_generator, latents):
    return (distributed.share(latents[0]),)


def _made(make, is_generator=False):
    @functools.wraps(make)
    def join(*args, **kwargs):
        network = make(*args, **kwargs)
        if is_generator:
            network.register_forward_pre_hook(_share_latents)
            distributed.synchronize(network)
        else:
            distributed.join(network)
        return network

    return join


def pytest_configure(config):
    distributed.meet()
    models.get_model = _made(models.get_model)
    models.get_segmenter = _made(models.get_segmenter)
    models.get_generator = _made(models.get_generator, is_generator=True)
