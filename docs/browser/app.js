// The page and its worker in one script: the page decodes and shows photos, the worker runs the network.
const LARGEST = 24e6; // pixels; a browser's canvas and the worker's memory take no more everywhere
const TILE = 512; // side of a tile in pixels; what has no more pixels than its square goes through whole
const OVERLAP = 32; // pixels around the middle of a tile that are computed and not used

if (typeof document === 'undefined') worker();
else page();

function worker() {
  const session = load();
  session.then(() => postMessage({ ready: true }), (error) => postMessage({ error: `The network could not be loaded: ${error.message}` }));
  self.onmessage = async ({ data: { pixels, width, height } }) => {
    try {
      const { ort, network } = await session;
      const out = new Uint8ClampedArray(pixels);
      const whole = width * height <= TILE * TILE;
      const columns = whole ? [[0, width, 0, width]] : spans(width);
      const rows = whole ? [[0, height, 0, height]] : spans(height);
      let done = 0;
      for (const [top, bottom, y0, y1] of rows) {
        for (const [left, right, x0, x1] of columns) {
          const [w, h] = [right - left, bottom - top];
          const input = planes(pixels, width, left, top, w, h);
          const { restored } = await network.run({ image: new ort.Tensor('float32', input, [1, 3, h, w]) });
          for (let y = y0; y < y1; y++)
            for (let x = x0; x < x1; x++)
              for (let c = 0; c < 3; c++)
                out[4 * (y * width + x) + c] = Math.round(255 * restored.data[(c * h + y - top) * w + x - left]);
          restored.dispose();
          postMessage({ progress: ++done / (rows.length * columns.length) });
        }
      }
      postMessage({ pixels: out, width, height }, [out.buffer]);
    } catch (error) {
      postMessage({ error: `This photo could not be restored: ${error.message}` });
    }
  };
}

async function load() {
  const ort = await import('./ort.wasm.min.mjs');
  ort.env.wasm.wasmPaths = new URL('./', import.meta.url).href;
  ort.env.wasm.numThreads = self.crossOriginIsolated ? Math.min(4, navigator.hardwareConcurrency || 1) : 1;
  const file = new URL('network.onnx', import.meta.url).href;
  // Without the runtime's optimizations, which gain nothing here. What takes a session minutes is not known yet.
  const options = { executionProviders: ['wasm'], graphOptimizationLevel: 'disabled' };
  return { ort, network: await ort.InferenceSession.create(file, options) };
}

// Tiles of a side: [start, end) of what is computed, and of what is used. All tiles lie within the image.
function spans(side) {
  if (side <= TILE) return [[0, side, 0, side]];
  const step = TILE - 2 * OVERLAP;
  const count = Math.ceil((side - 2 * OVERLAP) / step);
  const list = [];
  for (let i = 0, from = 0; i < count; i++) {
    const start = Math.min(i * step, side - TILE);
    const to = i === count - 1 ? side : start + TILE - OVERLAP;
    list.push([start, start + TILE, from, to]);
    from = to;
  }
  return list;
}

function planes(pixels, stride, left, top, width, height) {
  const out = new Float32Array(3 * width * height);
  for (let y = 0, i = 0; y < height; y++)
    for (let x = 0; x < width; x++, i++)
      for (let c = 0; c < 3; c++) out[c * width * height + i] = pixels[4 * ((top + y) * stride + left + x) + c] / 255;
  return out;
}

function page() {
  const element = (id) => document.getElementById(id);
  const say = (state, error = '') => { element('state').textContent = state; element('error').textContent = error; };
  const process = new Worker(new URL('app.js', import.meta.url), { type: 'module' });
  let busy = false;
  let ready = false;
  const fail = (message) => { busy = false; element('progress').hidden = true; say('', message); };
  process.onerror = (event) => fail(`The network could not be started: ${event.message || 'see the console'}`);
  process.onmessage = ({ data }) => {
    if (data.error) fail(data.error);
    else if (data.ready) { ready = true; if (!busy) say('Ready.'); }
    else if (data.progress) element('progress').value = data.progress;
    else show(data);
  };
  say('Loading the network.');

  async function take(file) {
    if (!file || busy) return;
    busy = true;
    try {
      element('view').hidden = true;
      let bitmap;
      try {
        bitmap = await createImageBitmap(file, { imageOrientation: 'from-image' });
      } catch {
        return fail(`${file.name} is not a picture that this browser reads.`);
      }
      const { width, height } = bitmap;
      if (width * height > LARGEST)
        return fail(`${file.name} has ${Math.round(width * height / 1e6)} megapixels; this page takes ${LARGEST / 1e6}. Use serpent restore.`);
      const before = element('before');
      Object.assign(before, { width, height });
      const context = before.getContext('2d', { willReadFrequently: true });
      context.drawImage(bitmap, 0, 0);
      bitmap.close();
      const { data } = context.getImageData(0, 0, width, height);
      say(ready ? 'Restoring.' : 'Loading the network, then restoring.');
      Object.assign(element('progress'), { hidden: false, value: 0 });
      process.postMessage({ pixels: data, width, height }, [data.buffer]);
    } catch (error) {
      fail(`${file.name} could not be opened: ${error.message}`);
    }
  }

  function show({ pixels, width, height }) {
    busy = false;
    const after = element('after');
    Object.assign(after, { width, height });
    after.getContext('2d').putImageData(new ImageData(pixels, width, height), 0, 0);
    element('progress').hidden = true;
    element('view').hidden = false;
    slide();
    after.toBlob((blob) => {
      URL.revokeObjectURL(element('download').href);
      element('download').href = URL.createObjectURL(blob);
      say('Done.');
    });
  }

  const slide = () => { element('after').style.clipPath = `inset(0 0 0 ${element('slider').value}%)`; };
  element('slider').oninput = slide;
  element('file').onchange = (event) => { take(event.target.files[0]); event.target.value = ''; };
  const drop = element('drop');
  drop.ondragover = (event) => { event.preventDefault(); drop.classList.add('over'); };
  drop.ondragleave = () => drop.classList.remove('over');
  drop.ondrop = (event) => { event.preventDefault(); drop.classList.remove('over'); take(event.dataTransfer.files[0]); };
}
