// Draws pictures from text in a browser, with a model in ONNX and onnxruntime-web. Without a page (in node) it
// only gives its parts.

// ---- text

const SPECIAL = /(<\|startoftext\|>|<\|endoftext\|>)/;
const WORD = /'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\p{White_Space}\p{L}\p{N}]+/gu;

// CLIP writes each of the 256 bytes as a visible character.
function byteLetters() {
  const letters = [];
  let other = 256;
  for (let byte = 0; byte < 256; byte++) {
    const visible = (byte > 32 && byte < 127) || (byte > 160 && byte !== 173);
    letters.push(String.fromCharCode(visible ? byte : other++));
  }
  return letters;
}

export class Tokenizer {
  // vocabulary: token -> id, merges: list of pairs, length: tokens of a prompt
  constructor({ vocabulary, merges, length, start, end }) {
    Object.assign(this, { vocabulary, length, start, end });
    this.ranks = new Map(merges.map((pair, rank) => [pair.join(' '), rank]));
    this.letters = byteLetters();
  }

  allIds(text) {
    return text.split(SPECIAL).flatMap((part) => this.encodePart(part));
  }

  fits(text) {
    return this.allIds(text).length <= this.length - 2;
  }

  // The ids of a prompt, padded or cut to `length`.
  encode(text) {
    const ids = this.allIds(text);
    const whole = [this.start, ...ids.slice(0, this.length - 2), this.end];
    return [...whole, ...Array(this.length - whole.length).fill(this.end)];
  }

  encodePart(text) {
    if (SPECIAL.test(text)) return [this.vocabulary[text]];
    const plain = [...text.normalize('NFC')].map((c) => c.toLowerCase()).join('');
    return (plain.match(WORD) || []).flatMap((word) => this.encodeWord(word));
  }

  encodeWord(word) {
    const bytes = [...new TextEncoder().encode(word)];
    let tokens = bytes.map((byte) => this.letters[byte]);
    tokens[tokens.length - 1] += '</w>';
    while (tokens.length > 1) {
      const pairs = tokens.slice(1).map((token, i) => this.ranks.get(`${tokens[i]} ${token}`) ?? Infinity);
      const best = Math.min(...pairs);
      if (best === Infinity) break;
      const at = pairs.indexOf(best);
      tokens.splice(at, 2, tokens[at] + tokens[at + 1]);
    }
    return tokens.map((token) => this.vocabulary[token] ?? this.end);
  }
}

const SPACE = /[\p{White_Space}\x1c-\x1f]+/u;
const LETTERS = /[\u3040-\u30ff\u3400-\u9fff]|(?:(?![\u3040-\u30ff\u3400-\u9fff])[\p{L}\p{M}])+/gu;

// Leave out words until a text fits, those first that the training captions have least often. `times` says how
// often they have a word. Python's is in models/vocabulary.py.
export function shorten(text, fits, times) {
  const words = text.split(SPACE).filter(Boolean);
  const count = (word) =>
    Math.max(0, ...(word.normalize('NFC').toLowerCase().match(LETTERS) || []).map((w) => times.get(w) ?? 0));
  const kept = [...words];
  const rarestFirst = words.map((word, i) => [count(word), i]).sort(([a], [b]) => a - b);
  for (const [, i] of rarestFirst) {
    if (fits(kept.filter(Boolean).join(' '))) break;
    kept[i] = '';
  }
  return kept.filter(Boolean).join(' ');
}

// ---- noise

// The Mersenne Twister, MT19937, as PyTorch's generator on the CPU uses it.
class Twister {
  constructor(seed) {
    this.state = new Uint32Array(624);
    this.state[0] = seed;
    for (let i = 1; i < 624; i++) {
      const last = this.state[i - 1] ^ (this.state[i - 1] >>> 30);
      this.state[i] = Math.imul(1812433253, last) + i;
    }
    this.next = 624;
  }

  refill() {
    const s = this.state;
    for (let i = 0; i < 624; i++) {
      const y = (s[i] & 0x80000000) | (s[(i + 1) % 624] & 0x7fffffff);
      s[i] = s[(i + 397) % 624] ^ (y >>> 1) ^ (y & 1 ? 0x9908b0df : 0);
    }
    this.next = 0;
  }

  random() {
    if (this.next === 624) this.refill();
    let y = this.state[this.next++];
    y ^= y >>> 11;
    y ^= (y << 7) & 0x9d2c5680;
    y ^= (y << 15) & 0xefc60000;
    return (y ^ (y >>> 18)) >>> 0;
  }
}

// Standard normal numbers, those of torch.randn(count, generator=torch.Generator().manual_seed(seed)).
// `count` is a multiple of 16: PyTorch applies Box-Muller to blocks of that size.
export function noise(seed, count) {
  const twister = new Twister(seed);
  const x = Float32Array.from({ length: count }, () => (twister.random() & 0xffffff) / 2 ** 24);
  for (let block = 0; block < count; block += 16) {
    for (let i = block; i < block + 8; i++) {
      const radius = Math.sqrt(-2 * Math.log(1 - x[i]));
      const angle = 2 * Math.PI * x[i + 8];
      x[i] = radius * Math.cos(angle);
      x[i + 8] = radius * Math.sin(angle);
    }
  }
  return x;
}

// ---- sampling: DPM-Solver++ 2M (Lu et al. 2022, arXiv 2211.01095), which is DDIM for order 1

function roundHalfEven(x) {
  const low = Math.floor(x);
  return x - low === 0.5 ? low + (low % 2) : Math.round(x);
}

// The timesteps of a number of steps, as Diffusers spaces them.
export function timesteps({ spacing, last, alphas }, steps) {
  const at = {
    linspace: (i) => roundHalfEven(((last - 1) * (steps - i)) / steps),
    trailing: (i) => roundHalfEven(last - (i * alphas.length) / steps) - 1,
  };
  return Array.from({ length: steps }, (_, i) => at[spacing](i));
}

// The clean latents that a model output stands for.
export function predictClean(x, output, alpha, prediction) {
  const signal = Math.sqrt(alpha);
  const noisy = Math.sqrt(1 - alpha);
  return x.map((value, i) => {
    if (prediction === 'v_prediction') return signal * value - noisy * output[i];
    if (prediction === 'sample') return output[i];
    return (value - noisy * output[i]) / signal;
  });
}

// Latents from noise. `denoise(latents, t)` returns the guided model output; `onStep(i, clean)` may be async.
export async function sample(schedule, latents, steps, denoise, onStep = () => {}) {
  const times = timesteps(schedule, steps);
  const level = (i) => (i < steps ? schedule.alphas[times[i]] : 1); // share of signal, all of it at the end
  const lambda = (i) => 0.5 * Math.log(level(i) / (1 - level(i)));
  let x = latents;
  let before = null;
  for (let i = 0; i < steps; i++) {
    const clean = predictClean(x, await denoise(x, times[i]), level(i), schedule.prediction);
    const next = level(i + 1);
    const h = lambda(i + 1) - lambda(i);
    const keep = Math.sqrt((1 - next) / (1 - level(i)));
    const add = -Math.sqrt(next) * Math.expm1(-h);
    const second = schedule.order === 2 && before && i + 1 < steps;
    const ratio = second ? h / (lambda(i) - lambda(i - 1)) / 2 : 0;
    x = x.map((value, j) => {
      const slope = second ? ratio * (clean[j] - before[j]) : 0;
      return keep * value + add * (clean[j] + slope);
    });
    before = clean;
    await onStep(i, clean);
  }
  return x;
}

// ---- the model

const product = (shape) => shape.reduce((a, b) => a * b, 1);

export class Model {
  // card: model.json, sessions: of onnxruntime-web (or -node), by part
  constructor(ort, card, sessions) {
    Object.assign(this, { ort, card, sessions });
    this.tokenizer = new Tokenizer(card.tokenizer);
    this.times = new Map(Object.entries(card.words ?? {}));
  }

  // What is read of a prompt: if it is too long, the words that the model knows best.
  readable(prompt) {
    const fits = (text) => this.tokenizer.fits(text);
    return !this.times.size || fits(prompt) ? prompt : shorten(prompt, fits, this.times);
  }

  async encode(prompts) {
    const { length } = this.card.tokenizer;
    const ids = BigInt64Array.from(prompts.flatMap((p) => this.tokenizer.encode(this.readable(p))), BigInt);
    const input_ids = new this.ort.Tensor('int64', ids, [prompts.length, length]);
    return (await this.sessions.text_encoder.run({ input_ids })).last_hidden_state;
  }

  async denoise(latents, t, text, guidance) {
    const count = text.dims[0]; // with guidance, the empty prompt comes first
    const shape = [count, ...this.card.latents];
    const sample = new Float32Array(count * latents.length);
    for (let i = 0; i < count; i++) sample.set(latents, i * latents.length);
    const inputs = {
      sample: new this.ort.Tensor('float32', sample, shape),
      timestep: new this.ort.Tensor('int64', BigInt64Array.of(BigInt(t)), []),
      encoder_hidden_states: text,
    };
    const { unet } = this.sessions;
    const used = Object.fromEntries(unet.inputNames.map((name) => [name, inputs[name]]));
    const output = (await unet.run(used)).out_sample.data;
    if (count === 1) return output;
    const withText = output.subarray(latents.length);
    return latents.map((_, i) => output[i] + guidance * (withText[i] - output[i]));
  }

  // The pixels of latents, [3, height, width] from -1 to 1.
  async decode(latents) {
    const scaled = latents.map((x) => x / this.card.scaling);
    const latent_sample = new this.ort.Tensor('float32', scaled, [1, ...this.card.latents]);
    return (await this.sessions.vae_decoder.run({ latent_sample })).sample;
  }

  async draw(prompt, { seed, steps, guidance, onStep }) {
    const text = await this.encode(guidance > 1 ? ['', prompt] : [prompt]);
    const start = noise(seed, product(this.card.latents));
    const denoise = (x, t) => this.denoise(x, t, text, guidance);
    return this.decode(await sample(this.card, start, steps, denoise, onStep));
  }
}

// Red, green, blue and alpha, 0 to 255, of decoded pixels.
export function toBytes({ data, dims }) {
  const size = dims[2] * dims[3];
  const bytes = new Uint8ClampedArray(4 * size).fill(255);
  for (let i = 0; i < size; i++) {
    for (let c = 0; c < 3; c++) bytes[4 * i + c] = Math.round((data[c * size + i] / 2 + 0.5) * 255);
  }
  return bytes;
}

// ---- the page

const PARTS = ['text_encoder', 'unet', 'vae_decoder'];

async function fetchBytes(address, onBytes) {
  const response = await fetch(address);
  if (!response.ok) throw new Error(`${address}: the server answers ${response.status}`);
  const parts = [];
  for (let reader = response.body.getReader(), got; !(got = await reader.read()).done; ) {
    parts.push(got.value);
    onBytes(got.value.length);
  }
  return new Uint8Array(await new Blob(parts).arrayBuffer());
}

async function loadModel(card, onProgress) {
  const ort = await import('./ort.wasm.bundle.min.mjs');
  ort.env.wasm.wasmPaths = { wasm: new URL('ort-wasm-simd-threaded.wasm', import.meta.url).href };
  ort.env.wasm.numThreads = self.crossOriginIsolated ? Math.min(4, navigator.hardwareConcurrency) : 1;
  let have = 0;
  const sessions = {};
  for (const part of PARTS) {
    const bytes = await fetchBytes(`model/${part}.onnx`, (n) => onProgress((have += n) / card.bytes));
    sessions[part] = await ort.InferenceSession.create(bytes, { executionProviders: ['wasm'] });
  }
  return new Model(ort, card, sessions);
}

class Page {
  constructor(card) {
    this.card = card;
    this.form = document.querySelector('form');
    this.canvas = document.querySelector('canvas');
    this.canvas.width = this.canvas.height = Math.max(512, card.size);
    this.small = new OffscreenCanvas(card.size, card.size);
    this.status = document.querySelector('output');
    this.bar = document.querySelector('progress');
    this.save = document.querySelector('#save');
  }

  field(name) {
    return this.form.elements[name];
  }

  fill() {
    document.title = document.querySelector('h1').textContent = `${this.card.name}, in your browser`;
    for (const name of ['steps', 'guidance']) this.field(name).value = this.card[name];
    for (const prompt of this.card.prompts) {
      const button = Object.assign(document.createElement('button'), { type: 'button', textContent: prompt });
      button.onclick = () => {
        this.field('prompt').value = prompt;
        this.form.requestSubmit();
      };
      document.querySelector('#examples').append(button);
    }
    this.field('prompt').value = this.card.prompts[0] || '';
    this.form.onsubmit = (event) => {
      event.preventDefault();
      this.draw();
    };
    document.querySelector('#another').onclick = () => {
      this.field('seed').value = Math.floor(Math.random() * 1e6);
      this.form.requestSubmit();
    };
    this.save.onclick = () => this.download();
  }

  say(text, share = null) {
    this.status.textContent = text;
    this.bar.hidden = share === null;
    if (share !== null) this.bar.value = share;
  }

  async load() {
    const megabytes = (this.card.bytes / 1e6).toFixed(0);
    const started = (share) => this.say(`Loading the model, ${megabytes} MB, once …`, share);
    started(0);
    this.model = await loadModel(this.card, started);
    this.form.querySelector('fieldset').disabled = false;
    this.say('Ready.');
  }

  show(pixels) {
    const side = this.small.width;
    this.small.getContext('2d').putImageData(new ImageData(toBytes(pixels), side, side), 0, 0);
    const context = this.canvas.getContext('2d');
    context.imageSmoothingQuality = 'high';
    context.drawImage(this.small, 0, 0, this.canvas.width, this.canvas.height);
  }

  async draw() {
    const [steps, seed, guidance] = ['steps', 'seed', 'guidance'].map((name) => Number(this.field(name).value));
    const prompt = this.field('prompt').value.trim();
    const begun = performance.now();
    this.form.querySelector('fieldset').disabled = true;
    const onStep = async (i, clean) => {
      this.say(`Step ${i + 1} of ${steps}`, (i + 1) / steps);
      if (i % 4 === 0) this.show(await this.model.decode(clean));
      await new Promise((resolve) => setTimeout(resolve)); // lets the browser paint
    };
    try {
      this.show(await this.model.draw(prompt, { seed, steps, guidance, onStep }));
      this.canvas.setAttribute('aria-label', `${prompt}, seed ${seed}`);
      this.save.disabled = false;
      this.say(`${prompt}, seed ${seed}: ${((performance.now() - begun) / 1000).toFixed(1)} s`);
    } catch (error) {
      this.say(`Nothing was drawn: ${error.message}`);
    }
    this.form.querySelector('fieldset').disabled = false;
  }

  async download() {
    const name = `${this.field('prompt').value.trim().replace(/\W+/g, '-') || 'picture'}-${this.field('seed').value}.png`;
    const link = document.createElement('a');
    const picture = await new Promise((resolve) => this.canvas.toBlob(resolve));
    link.href = URL.createObjectURL(picture);
    link.download = name;
    link.click();
    URL.revokeObjectURL(link.href);
  }
}

async function start() {
  const page = new Page(await (await fetch('model.json')).json());
  page.fill();
  try {
    await page.load();
  } catch (error) {
    page.say(`The model was not loaded: ${error.message}`);
  }
}

if (typeof document !== 'undefined') start();
