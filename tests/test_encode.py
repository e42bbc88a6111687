"Encoding: kills, bad components, the hub's cache, a text encoder of the run's own, other readers."

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from flowerdiff.core.errors import UserError
from flowerdiff.core.files import read_json, write_json
from flowerdiff.core.workspace import open_workspace, write_jsonl
from flowerdiff.data.shards import Shards
from flowerdiff.models.components import (
    component_fingerprint,
    load_autoencoder,
    load_text,
)
from flowerdiff.models.saving import save_components


def tiny_vae(folder, **config):
    torch.manual_seed(0)
    diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8,) * 3,
        decoder_block_out_channels=(8,) * 3,
        num_encoder_blocks=(0, 1, 1),
        num_decoder_blocks=(1, 1, 1),
        **config,
    ).save_pretrained(folder)
    return folder


def tiny_clip(folder, length=8):
    letters = [chr(c) for c in range(97, 123)]
    names = [
        *letters,
        *(letter + '</w>' for letter in letters),
        'ro',
        'ros',
        'rose</w>',
        '<|startoftext|>',
        '<|endoftext|>',
    ]
    tokenizer = CLIPTokenizer(
        vocab={w: i for i, w in enumerate(names)},
        merges=[('r', 'o'), ('ro', 's'), ('ros', 'e</w>')],
        model_max_length=length,
    )
    tower = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    torch.manual_seed(0)
    CLIPModel(
        CLIPConfig(
            text_config=dict(
                tower,
                vocab_size=len(names),
                max_position_embeddings=length,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
            ),
            vision_config=dict(tower, image_size=32, patch_size=8),
            projection_dim=16,
        )
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope='module')
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp('parts')
    tiny_vae(folder / 'vae')
    tiny_clip(folder / 'clip')
    return folder


def make_workspace(root, parts, n=40, **settings):
    "Pictures and captions as the stages before leave them."
    ws = open_workspace(
        root,
        'garden',
        {
            'components.autoencoder': str(parts / 'vae'),
            'components.text_encoder': str(parts / 'clip'),
            'prepare.source': str(root),  # of one's own: no caption is misspelled
            'prepare.resolution': 32,
            'encode.batch_size': 4,
            'encode.shard_records': 8,
        }
        | settings,
    )
    rng, rows = np.random.default_rng(0), []
    for split, k in (('train', n), ('val', 4), ('test', 4)):
        (ws.pictures / split).mkdir(parents=True)
        names = [f'{i:06}.png' for i in range(k)]
        for i, f in enumerate(names):
            Image.fromarray(rng.integers(0, 255, (32, 32, 3), np.uint8)).save(ws.pictures / split / f)
            rows.append(
                dict(
                    file_name=f'{split}/{f}',
                    captions=[f'rose {"abc"[i % 3]}', 'rose'][: 1 + i % 2],
                    captioner='given',
                )
            )
        write_jsonl(ws.pictures / split / 'metadata.jsonl', [dict(file_name=f) for f in names])
    write_jsonl(ws.captions / 'metadata.jsonl', rows)
    return ws


def encode(ws):
    from flowerdiff.stages.encode import run

    return run(ws.root)


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob('*')) if p.is_file()}


@pytest.fixture(scope='module')
def encoded(parts, tmp_path_factory):
    ws = make_workspace(tmp_path_factory.mktemp('whole') / 'ws', parts)
    encode(ws)
    return ws


SLOW = """
import sys, time
from flowerdiff.data import encoding
fast = encoding.encode_batch
def slow(*args):
    time.sleep(.1)
    return fast(*args)
encoding.encode_batch = slow
from flowerdiff.stages.encode import run
run(sys.argv[1])
"""


def test_killed_encode_loses_one_shard_and_ends_with_the_same_bytes(parts, encoded, tmp_path):
    ws = make_workspace(tmp_path / 'ws', parts)
    p = subprocess.Popen([sys.executable, '-c', SLOW, str(ws.root)])

    def finished():  # shards that the manifest tells of
        return [
            f.with_name(f'latents-{i:05}.bin')
            for f in ws.work.glob('encode-*/train/latents.json')
            for i in range(len(read_json(f)['shards']))
        ]

    end = time.time() + 300
    while len(finished()) < 2 and p.poll() is None and time.time() < end:
        time.sleep(0.02)
    p.send_signal(signal.SIGKILL)
    p.wait()
    done = {f: f.stat().st_mtime_ns for f in finished()}
    assert 2 <= len(done) < 5 and not ws.encoded.exists()
    encode(ws)
    assert contents(ws.encoded) == contents(encoded.encoded)
    for f, t in done.items():
        assert (ws.encoded / 'train' / f.name).stat().st_mtime_ns == t, f'{f.name} was encoded again'
    assert not list(ws.work.glob('encode-*/')), 'what was in progress is in its place now'


def test_two_processes_encode_what_one_does(parts, encoded, tmp_path):
    ws = make_workspace(tmp_path / 'ws', parts, **{'encode.num_processes': 2})
    last = ws.pictures / 'train' / '000039.png'
    whole = last.read_bytes()
    last.write_bytes(whole[:100])
    with pytest.raises(UserError, match=r'000039\.png: is truncated') as e:
        encode(ws)
    assert '\n' not in str(e.value) and not ws.encoded.exists()
    last.write_bytes(whole)
    encode(ws)
    ours, theirs = contents(ws.encoded), contents(encoded.encoded)
    assert set(ours) == set(theirs) and [k for k in ours if ours[k] != theirs[k]] == []
    assert not list(ws.work.glob('encode-*/')), 'what was in progress is in its place now'


def test_shards_of_a_worker_that_was_stopped_are_not_made_again(parts, encoded, tmp_path):
    from flowerdiff.data.distributed_encoding import encode_share, join
    from flowerdiff.models.components import save_part

    ws = encoded
    files = read_json(ws.encoded / 'train' / 'files.json', kind=list)
    save_part(load_autoencoder(str(parts / 'vae')), tmp_path / 'j' / 'vae')
    job = dict(
        sets=[('train', None, files)],
        pictures=str(ws.pictures),
        new=str(tmp_path / 'new'),
        side=32,
        batch_size=4,
        shard_records=8,
    )
    first = encode_share(job, tmp_path / 'j', 1, 2)
    [next(first) for _ in range(3)]
    first.close()  # 12 of its 24: a shard on the disk, and one that is not finished
    kept = {f.name: f.stat().st_mtime_ns for f in (tmp_path / 'new' / 'train' / 'rank-1-of-2').glob('*.bin')}
    assert list(kept) == ['latents-00000.bin']
    assert [sum(e['pictures'] for e in encode_share(job, tmp_path / 'j', r, 2)) for r in (0, 1)] == [16, 16]
    join(tmp_path / 'new' / 'train', 'latents', 2)
    for f, t in kept.items():
        assert (tmp_path / 'new' / 'train' / 'rank-1-of-2' / f).stat().st_mtime_ns == t
    assert all(
        (tmp_path / 'new' / 'train' / f.name).read_bytes() == f.read_bytes()
        for f in (ws.encoded / 'train').glob('latents*')
    )


def test_unique_captions_all_positions_and_the_null_prompt(encoded):
    texts = read_json(encoded.encoded / 'text' / 'texts.json', kind=list)
    assert texts[0] == '' and sorted(texts[1:]) == ['rose', 'rose a', 'rose b', 'rose c']
    e = Shards(encoded.encoded / 'text', 'text').load()['embedding']
    assert e.shape == (5, 8, 16) and e.dtype == np.float16
    pipe_like = load_text(encoded.encoded / 'components')
    with torch.no_grad():
        want = pipe_like.model(
            pipe_like.tokenizer(
                [''], padding='max_length', max_length=8, truncation=True, return_tensors='pt'
            ).input_ids
        )[0]
    assert np.abs(e[0] - want[0].numpy()).max() < 1e-2
    for split, n in (('train', 40), ('val', 4), ('test', 4)):
        numbers = read_json(encoded.encoded / split / 'captions.json', kind=list)
        assert (
            len(numbers)
            == n
            == len(Shards(encoded.encoded / split, 'latents'))
            == len(read_json(encoded.encoded / split / 'files.json', kind=list))
        )
        assert [[texts[i] for i in ns] for ns in numbers[:2]] == [['rose a'], ['rose b', 'rose']]


def test_manifest_is_a_function_of_the_inputs(encoded, parts, tmp_path):
    m = read_json(encoded.encoded / 'manifest.json')
    assert m['shapes'] == dict(mean=[2, 4, 8, 8], std=[2, 4, 8, 8], embedding=[8, 16]) and m[
        'records'
    ] == dict(train=40, val=4, test=4, text=5)
    other = make_workspace(tmp_path / 'other', parts, **{'encode.shard_records': 20})
    encode(other)
    assert (
        read_json(other.encoded / 'manifest.json')['fingerprint'] == m['fingerprint']
    )  # another layout is not other data
    rows = [json.loads(line) for line in (other.captions / 'metadata.jsonl').read_text().splitlines()]
    rows[0]['captions'] = ['rose x']
    write_jsonl(other.captions / 'metadata.jsonl', rows)
    encode(other)
    assert read_json(other.encoded / 'manifest.json')['fingerprint'] != m['fingerprint']


def test_nothing_is_encoded_twice(encoded, monkeypatch):
    from flowerdiff.data import encoding

    monkeypatch.setattr(encoding, 'encode_batch', None)
    before = contents(encoded.encoded)
    assert 'as encoded before' in encode(encoded).summary
    assert contents(encoded.encoded) == before


def test_other_latents_of_the_same_pictures_with_another_autoencoder(parts, encoded, tmp_path):
    torch.manual_seed(1)
    diffusers.AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=('DownEncoderBlock2D',) * 2,
        up_block_types=('UpDecoderBlock2D',) * 2,
        norm_num_groups=4,
        scaling_factor=0.5,
    ).save_pretrained(tmp_path / 'kl')
    ws = make_workspace(tmp_path / 'ws', parts, 8, **{'components.autoencoder': str(tmp_path / 'kl')})
    encode(ws)
    got = Shards(ws.encoded / 'train', 'latents').load()
    assert got['mean'].shape == (8, 2, 4, 16, 16) and (got['std'] > 0).all()
    vae = load_autoencoder(tmp_path / 'kl')
    x = (
        torch.from_numpy(np.array(Image.open(ws.pictures / 'train' / '000002.png')))
        .permute(2, 0, 1)[None]
        .float()
        / 127.5
        - 1
    )
    with torch.no_grad():
        want = torch.cat([vae.encode(v).latent_dist.mean * 0.5 for v in (x, x.flip(-1))]).numpy()
    assert np.abs(got['mean'][2].astype(np.float32) - want).max() < 0.02 * np.abs(want).max()
    assert read_json(ws.encoded / 'manifest.json')['scaling_factor'] == 0.5


@pytest.mark.parametrize(
    'break_it,said',
    [
        (lambda ws, d: shutil.rmtree(d / 'vae'), 'no such folder'),
        (lambda ws, d: (d / 'vae' / 'config.json').unlink(), 'holds no vae'),
        (
            lambda ws, d: next((d / 'vae').glob('*.safetensors')).rename(
                d / 'vae' / 'diffusion_pytorch_model.bin'
            ),
            'convert it to safetensors',
        ),
        (lambda ws, d: next((d / 'vae').glob('*.safetensors')).write_bytes(b'12'), 'cannot be opened'),
        (
            lambda ws, d: write_json(d / 'vae' / 'config.json', dict(_class_name='VQModel')),
            'only AutoencoderKL and AutoencoderTiny',
        ),
        (lambda ws, d: [f.unlink() for f in (d / 'clip').iterdir() if 'token' in f.name], 'has no tokenizer'),
        (
            lambda ws, d: write_json(d / 'clip' / 'config.json', dict(model_type='t5')),
            "only CLIP's text model",
        ),
        (lambda ws, d: (ws.pictures / 'train' / '000003.png').unlink(), '000003.png'),
        (lambda ws, d: (ws.pictures / 'val' / '000001.png').write_bytes(b'x'), '000001.png'),
        (
            lambda ws, d: (ws.captions / 'metadata.jsonl').write_text(''),
            'says nothing about train/000000.png',
        ),
        (lambda ws, d: open_workspace(ws.root, None, {'prepare.resolution': 64}), 'is 32x32 and not 64x64'),
    ],
)
def test_each_mistake_is_one_line(parts, tmp_path, break_it, said):
    shutil.copytree(parts, tmp_path / 'parts')
    ws = make_workspace(tmp_path / 'ws', tmp_path / 'parts', 8)
    break_it(ws, tmp_path / 'parts')
    with pytest.raises(UserError, match=said) as e:
        encode(ws)
    assert '\n' not in str(e.value) and len(str(e.value)) < 400
    assert not ws.encoded.exists()


def test_latents_that_are_not_finite(parts, tmp_path):
    shutil.copytree(parts, tmp_path / 'parts')
    vae = load_autoencoder(parts / 'vae')
    vae.encoder.layers[0].weight.mul_(1e30)
    vae.save_pretrained(tmp_path / 'parts' / 'vae')
    ws = make_workspace(tmp_path / 'ws', tmp_path / 'parts', 8)
    with pytest.raises(UserError, match=r'000000\.png.*not finite'):
        encode(ws)


def test_failed_encode_leaves_the_old_result(parts, tmp_path):
    ws = make_workspace(tmp_path / 'ws', parts, 8)
    encode(ws)
    before = contents(ws.encoded)
    (ws.pictures / 'test' / '000003.png').write_bytes(b'x')
    with pytest.raises(UserError):
        encode(ws)
    assert contents(ws.encoded) == before


HUB = """
import sys
from flowerdiff.models.components import load_autoencoder
from flowerdiff.core.workspace import UserError
for spec in sys.argv[1:]:
    try: print(type(load_autoencoder(spec)).__name__)
    except UserError as e: print(e)
"""


def test_hub_models_come_from_the_cache_without_a_network(parts, tmp_path):
    commit = '0123456789abcdef0123456789abcdef01234567'
    snapshot = tmp_path / 'hub' / 'models--someone--small-vae' / 'snapshots' / commit
    shutil.copytree(parts / 'vae', snapshot)
    env = os.environ | dict(HF_HOME=str(tmp_path), HF_HUB_CACHE=str(tmp_path / 'hub'), HF_HUB_OFFLINE='1')
    specs = [f'someone/{name}-vae@{commit}' for name in ('small', 'other')]
    found, missing = subprocess.run(
        [sys.executable, '-c', HUB, *specs], env=env, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert found == 'AutoencoderTiny' and missing.startswith(f'{specs[1]}: is not in this machine')


def test_published_text_encoder_in_the_names_of_transformers_4(parts, tmp_path):
    "Version 4 needs the prefix text_model. and vocab.json and merges.txt. Saving twice changes nothing."
    from safetensors import safe_open

    for i, source in enumerate((parts / 'clip', tmp_path / '0', tmp_path / '1')):
        save_components(tmp_path / str(i), load_autoencoder(parts / 'vae'), load_text(source))
        with safe_open(tmp_path / str(i) / 'text_encoder' / 'model.safetensors', 'pt') as f:
            names = set(f.keys())
        assert all(n.count('text_model.') == 1 and n.startswith('text_model.') for n in names)
    assert {
        'text_model.embeddings.token_embedding.weight',
        'text_model.final_layer_norm.bias',
        'text_model.encoder.layers.0.self_attn.q_proj.weight',
    } <= names
    assert component_fingerprint(tmp_path / '1' / 'text_encoder') == component_fingerprint(
        tmp_path / '2' / 'text_encoder'
    )
    with safe_open(tmp_path / '0' / 'clip' / 'model.safetensors', 'pt') as f:
        assert {
            'text_model.embeddings.token_embedding.weight',
            'vision_model.post_layernorm.weight',
            'text_projection.weight',
        } <= set(f.keys())
    vocabulary, merges = (
        read_json(tmp_path / '0' / 'tokenizer' / 'vocab.json'),
        (tmp_path / '0' / 'tokenizer' / 'merges.txt').read_text().splitlines(),
    )
    assert vocabulary['<|endoftext|>'] == len(vocabulary) - 1 and merges == [
        '#version: 0.2',
        'r o',
        'ro s',
        'ros e</w>',
    ]


def test_own_clip_is_trained_once(parts, tmp_path, monkeypatch):
    library = pytest.importorskip('flowerdiff.training.own_encoders')
    calls = []

    def fake(ws, pairs, steps, work):
        assert (len(pairs['train']), len(pairs['val']), len(pairs['test'])) == (8, 4, 4)
        calls.append(steps)
        tiny_clip(work / 'clip', 16)
        test = dict(passed=True, text='beats chance', recall_5=1.0)
        write_json(work / 'done.json', dict(best_step=1, most_steps=steps, complete=True, test=test))

    monkeypatch.setattr(library, 'fit_clip', fake)
    ws = make_workspace(
        tmp_path / 'ws', parts, 8, **{'components.text_encoder': 'train', 'encode.clip_steps': 2}
    )
    encode(ws)
    assert calls == [2]
    assert (ws.encoded / 'components' / 'clip' / 'config.json').is_file()
    encode(open_workspace(ws.root, None, {'encode.shard_records': 5}))
    assert calls == [2], 'the same CLIP serves'
    encode(open_workspace(ws.root, None, {'encode.clip_steps': 3}))
    assert calls == [2, 3]


def test_batches_are_halved_until_they_fit(parts, encoded, tmp_path, monkeypatch, capsys):
    from flowerdiff.data import encoding

    ws = make_workspace(tmp_path / 'ws', parts, **{'encode.batch_size': 16})
    fast = encoding.encode_batch

    def small(vae, names, pictures):
        if len(pictures) > 3:
            raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB')
        return fast(vae, names, pictures)

    monkeypatch.setattr(encoding, 'encode_batch', small)
    encode(ws)
    for name in ('mean', 'std'):
        ours, theirs = (Shards(w.encoded / 'train', 'latents').load()[name] for w in (ws, encoded))
        assert np.allclose(ours, theirs, atol=2e-3)
    assert 'encode: 16 pictures at a time do not fit into memory, going on with 2' in capsys.readouterr().out


def test_memory_does_not_grow_with_the_pictures(parts, tmp_path):
    "What is held while encoding: two batches, whatever the number of pictures."
    import tracemalloc

    from flowerdiff.data.encoding import encode_pictures

    Image.new('RGB', (128, 128)).save(tmp_path / 'p.png')
    vae, peaks = load_autoencoder(parts / 'vae'), []
    for n in (16, 16, 160):
        tracemalloc.start()
        for _ in encode_pictures(
            vae, [tmp_path / 'p.png'] * n, 128, tmp_path / f'{n}-{len(peaks)}', 8, shard_records=8
        ):
            pass
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[2] < peaks[1] + 1_000_000  # 160 pictures of 49 KB would be 8 MB
