"Attention maps: a network that attends to one word, the unchanged image, a student."

import json

import numpy as np
import pytest
import torch
from tiny import tiny_model

from flowerdiff.inference.attention_maps import attention_maps, recording, token_maps, words_of
from flowerdiff.inference.generator import Generator

PROMPT = 'a red rose under the blue sky'


@pytest.fixture
def generator(tmp_path):
    return Generator.from_pretrained(tiny_model(tmp_path / 'tiny'), backend='torch')


def shares(generator, prompt, latents, **how):  # of all tokens
    with recording(generator.backend) as recorders:
        generator(prompt, **how)
    return token_maps(recorders, latents)


def made_to_read(generator, prompt, word):
    "Set the weights by hand so that all positions have the same query, and only the keys of a word match it."
    backend = generator.backend
    [place] = dict(words_of(backend.tokenizer, prompt))[word]
    wanted = backend.encode([prompt])[0, place] - backend.encode([''])[0, place]
    for block in (m for m in backend.unet.modules() if hasattr(m, 'attn2')):
        block.norm2.weight.zero_()
        block.norm2.bias.fill_(1.0)
        block.attn2.to_q.weight.fill_(1 / block.attn2.to_q.in_features)
        block.attn2.to_k.weight.copy_(20 * wanted.expand_as(block.attn2.to_k.weight))
    return generator


@pytest.mark.parametrize('guidance', [1.0, 4.0])
def test_only_the_word_that_is_attended_to_has_a_map(generator, guidance):
    "The row without a prompt has no such word."
    seen = attention_maps(
        made_to_read(generator, PROMPT, 'rose'), PROMPT, num_inference_steps=3, guidance_scale=guidance
    )
    for word, share in zip(seen.words, seen.maps):
        assert share.min() > 0.99 if word == 'rose' else share.abs().max() < 0.01, (word, share.mean())


def test_a_map_has_the_layout_of_the_image(generator):
    "In a wide image, the left half attends to the word and the right half to anything else."

    def halves(norm, _, out):
        w = round((1.5 * out.shape[1]) ** 0.5)
        return torch.where(torch.arange(out.shape[1]) % w < w / 2, 1.0, -1.0)[:, None] * out

    for block in (
        m for m in made_to_read(generator, PROMPT, 'rose').backend.unet.modules() if hasattr(m, 'attn2')
    ):
        block.norm2.register_forward_hook(halves)
    share = attention_maps(generator, PROMPT, num_inference_steps=1, size=(48, 32)).maps[2]
    assert share[:, :12].min() > 0.99 and share[:, 12:].abs().max() < 0.01


def test_tokens_of_a_word_are_one_map(generator):
    prompt, how = 'a poppy, red', dict(seed=3, num_inference_steps=3)
    assert [(w, len(i)) for w, i in words_of(generator.backend.tokenizer, prompt)] == [
        ('a', 1),
        ('poppy', 5),
        ('red', 1),
    ]
    seen, tokens = attention_maps(generator, prompt, **how), shares(generator, prompt, (16, 16), **how)
    assert seen.words == ['a', 'poppy', 'red'] and torch.equal(
        seen.maps, torch.stack([tokens[1], tokens[2:7].sum(0), tokens[8]])
    )


@pytest.mark.parametrize('size', [None, (48, 32)])
def test_weights_sum_to_one_and_the_image_stays(generator, size):
    how = dict(seed=5, num_inference_steps=4, guidance_scale=3.0, size=size)
    usual, old = generator(PROMPT, **how)[0], generator.backend.unet.attn_processors
    h, w = usual.height // 2, usual.width // 2
    seen, tokens = attention_maps(generator, PROMPT, **how), shares(generator, PROMPT, (h, w), **how)
    assert np.array_equal(seen.picture, usual) and generator.backend.unet.attn_processors == old
    assert (
        seen.maps.shape == (7, h, w)
        and tokens.shape == (16, h, w)
        and torch.allclose(tokens.sum(0), torch.ones(h, w), atol=1e-4)
    )
    assert [p.size for p in seen.pictures(96)] == [(96, 96 * h // w)] * 8


def test_a_failure_restores_the_processors(generator, monkeypatch):
    old = generator.backend.unet.attn_processors

    def broken(latents):
        raise ZeroDivisionError

    monkeypatch.setattr(generator.backend, 'decode', broken)
    with pytest.raises(ZeroDivisionError):
        attention_maps(generator, PROMPT, num_inference_steps=2)
    assert generator.backend.unet.attn_processors == old


def test_a_student_has_one_row(generator):
    "It uses its own steps without guidance, and its only row has the prompt."
    folder = generator.backend.folder
    (folder / 'train_settings.json').write_text(json.dumps(dict(train=dict(distill=2))))
    student = made_to_read(Generator.from_pretrained(folder, backend='torch'), PROMPT, 'sky')
    with recording(student.backend) as recorders:
        picture = student(PROMPT)[0]
    seen = attention_maps(student, PROMPT)
    assert (
        {r.calls for r in recorders} == {2}
        and np.array_equal(seen.picture, picture)
        and seen.maps[6].min() > 0.99
    )
