// The page: keys and buttons go out as messages, pictures come in and are painted once a screen refresh.

import { Chart } from "./chart.js";

const $ = (id) => document.getElementById(id);
const KEEP = 200; // key-to-frame times that the figures are taken over

let socket;
let about = null; // what the server said of the model
let state = { playing: false };
let picture = null; // the newest, painted or not
let painted = true;
let heat = { dream: null, real: null }; // bits of each place
let keyNumber = 0;
let waiting = null; // the last key whose frame has not been seen: {number, time}
const held = new Set(); // directions that are held down
const paints = []; // times of the last frames
const delays = []; // from key to frame, in milliseconds

// For tests, and for whoever looks into the console.
const stats = (window.starflowStats = {
  connected: false,
  frames: 0, // frames that were painted
  frame: -1,
  fps: 0,
  keyToFrame: { last: null, median: null, p95: null, count: 0 },
  bits: { dream: null, real: null },
  playing: false,
  errors: [],
  clips: 0,
});

const chart = new Chart($("chart"), seek);

// -- connection ------------------------------------------------------------------------------------------------------

function connect() {
  socket = new WebSocket(`${location.protocol === "https:" ? "wss" : "ws"}://${location.host}/socket`);
  socket.binaryType = "arraybuffer";
  socket.onmessage = ({ data }) => (typeof data === "string" ? heard(JSON.parse(data)) : received(data));
  socket.onclose = () => {
    stats.connected = false;
    $("play").disabled = true;
    say("The connection has ended. Is the command still running? Reload the page to begin again.", true);
  };
}

function send(type, fields = {}) {
  if (socket.readyState === WebSocket.OPEN) socket.send(JSON.stringify({ type, ...fields }));
}

function heard(message) {
  if (message.type === "hello") begin(message);
  if (message.type === "state") showState(message);
  if (message.type === "error") {
    stats.errors.push(message.text);
    say(message.text);
  }
}

// Four bytes with the length of a JSON header, the header, and the parts that it lists.
function received(data) {
  const length = new DataView(data).getUint32(0, true);
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(data, 4, length)));
  const parts = {};
  let place = 4 + length;
  for (const [name, size] of Object.entries(header.parts)) {
    parts[name] = data.slice(place, place + size);
    place += size;
  }
  if (header.type === "clip") return download(parts.mp4);
  send("seen", { number: header.number });
  if (header.bits) {
    for (const { frame, dream, real, edited } of header.bits) {
      chart.add(frame, dream, real, edited);
      stats.bits = { dream, real };
    }
    heat = { dream: floats(parts.dream_map), real: floats(parts.real_map) };
    painted = false;
  }
  if (header.frame !== undefined) {
    picture = { ...header, dream: parts.dream, real: parts.real };
    painted = false;
  }
}

const floats = (bytes) => (bytes ? new Float32Array(bytes) : null);

// -- pictures --------------------------------------------------------------------------------------------------------

function paint() {
  requestAnimationFrame(paint);
  chart.draw();
  if (painted || !picture) return;
  painted = true;
  drawPicture($("dream"), picture.dream);
  drawPicture($("real"), picture.real);
  $("real-figure").classList.toggle("gone", !picture.real);
  drawMap($("dream-map"), heat.dream);
  drawMap($("real-map"), picture.real ? heat.real : null);
  showBits("dream-bits", stats.bits.dream);
  showBits("real-bits", picture.real ? stats.bits.real : null);
  const { frame, first, last } = picture;
  // The same frame may be the last one now: a teleport in the past forgets what came after it.
  chart.keep(first, last);
  chart.show(frame, last);
  const timeline = $("timeline");
  [timeline.min, timeline.max, timeline.value] = [first, last, frame];
  $("frame").value = frame < last ? `${frame} of ${last}` : frame;
  if (frame === stats.frame) return;
  stats.frames += 1;
  stats.frame = frame;
  count(performance.now());
}

function drawPicture(canvas, bytes) {
  if (!bytes) return;
  const { width, height, channels } = about;
  const from = new Uint8Array(bytes);
  const pen = canvas.getContext("2d");
  const image = pen.createImageData(width, height);
  for (let place = 0; place < width * height; place++) {
    for (let colour = 0; colour < 3; colour++)
      image.data[4 * place + colour] = from[channels * place + (channels === 3 ? colour : 0)];
    image.data[4 * place + 3] = 255;
  }
  pen.putImageData(image, 0, 0);
}

// The noise alone makes the bits of a place spread: colour begins at five times that, and is full at thirty.
function drawMap(canvas, bits) {
  const pen = canvas.getContext("2d");
  pen.clearRect(0, 0, canvas.width, canvas.height);
  if (!bits || !$("heat").checked) return;
  const image = pen.createImageData(canvas.width, canvas.height);
  bits.forEach((value, place) => {
    const hot = Math.min(Math.max((value / about.spread - 5) / 25, 0), 1);
    image.data.set([255, 150 - 110 * hot, 40 + 40 * hot, 215 * Math.sqrt(hot)], 4 * place);
  });
  pen.putImageData(image, 0, 0);
}

function showBits(id, bits) {
  $(id).textContent = bits === null || bits === undefined ? "" : `${Math.round(bits)} bits`;
}

// Frames a second, and the time from a key to the first frame that knows of it.
function count(now) {
  paints.push(now);
  while (paints[0] < now - 2000) paints.shift();
  stats.fps = paints.length > 1 ? ((paints.length - 1) * 1000) / (now - paints[0]) : 0;
  if (waiting && picture.key >= waiting.number) {
    delays.push(now - waiting.time);
    if (delays.length > KEEP) delays.shift();
    waiting = null;
    const sorted = [...delays].sort((a, b) => a - b);
    const at = (share) => sorted[Math.min(Math.floor(share * sorted.length), sorted.length - 1)];
    const { count } = stats.keyToFrame;
    stats.keyToFrame = { last: delays.at(-1), median: at(0.5), p95: at(0.95), count: count + 1 };
  }
}

setInterval(() => {
  $("fps").textContent = state.playing ? stats.fps.toFixed(0) : "–";
  const { median } = stats.keyToFrame;
  $("latency").textContent = median === null ? "–" : `${median.toFixed(0)} ms`;
  $("made").textContent = picture?.seconds ? `${(1000 * picture.seconds).toFixed(0)} ms` : "–";
}, 250);

// -- what the server says --------------------------------------------------------------------------------------------

function begin(message) {
  about = message;
  stats.connected = true;
  document.title = `${about.model} · starflow play`;
  $("model").textContent = [about.model, about.world !== about.model && about.world].filter(Boolean).join(" · ");
  for (const name of ["dream", "real"]) {
    [$(name).width, $(name).height] = [about.width, about.height];
    [$(`${name}-map`).width, $(`${name}-map`).height] = [about.columns, about.rows];
  }
  for (const id of ["real-figure", "real-legend", "real-legend-text", "follow"]) $(id).hidden = !about.world;
  $("teleport").hidden = !about.teleport;
  $("ask").hidden = !about.text;
  $("new").textContent = about.text ? "New clip" : "New game";
  $("surprise").hidden = $("heat").parentElement.hidden = $("measure").parentElement.hidden = !about.measures;
  showActions();
}

function showState(message) {
  const seedChanged = message.seed !== state.seed;
  state = message;
  stats.playing = state.playing;
  $("play").textContent = state.playing ? "Pause" : "Play";
  $("record").textContent = state.recording ? "Stop" : "Record";
  $("record").setAttribute("aria-pressed", state.recording);
  $("temperature").value = state.temperature;
  $("temperature-value").value = state.temperature.toFixed(2);
  $("pace").value = state.pace;
  $("pace-value").value = `${Math.round(state.pace)} fps`;
  $("measure").checked = state.surprise;
  if (seedChanged) $("seed").value = state.seed;
  if (document.activeElement !== $("prompt")) $("prompt").value = state.prompt;
  $("follow").disabled = $("teleport").disabled = !state.real;
  if (!state.playing) paints.length = 0;
}

let fading;

function say(text, stays = false) {
  $("message").textContent = text;
  $("message").hidden = false;
  clearTimeout(fading);
  if (!stays) fading = setTimeout(() => ($("message").hidden = true), 6000);
}

function download(bytes) {
  stats.clips += 1;
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([bytes], { type: "video/mp4" }));
  link.download = `${about.model.replace(/[^\w-]+/g, "-")}.mp4`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
}

// -- actions ---------------------------------------------------------------------------------------------------------

const DIRECTIONS = ["up", "down", "left", "right", "fire"];
const SIGNS = { up: "▲", down: "▼", left: "◀", right: "▶", fire: "●" };
const KEYS = {
  ArrowUp: "up", KeyW: "up", ArrowDown: "down", KeyS: "down", ArrowLeft: "left", KeyA: "left",
  ArrowRight: "right", KeyD: "right", Space: "fire",
};

const wordsOf = (action) => DIRECTIONS.filter((word) => action.toLowerCase().includes(word));

// The action that says most of what is held down, and nothing else; without any, the one of no direction.
function chosen() {
  let best = 0;
  let most = -1;
  about.actions.forEach((action, index) => {
    if (held.has(index)) [best, most] = [index, Infinity];
    const words = wordsOf(action);
    if (words.length > most && words.every((word) => held.has(word))) [best, most] = [index, words.length];
  });
  return best;
}

let action = 0;

function hold(what, down, time) {
  if (!about?.actions.length || held.has(what) === down) return;
  down ? held.add(what) : held.delete(what);
  const next = chosen();
  if (next === action) return;
  action = next;
  keyNumber += 1;
  waiting = state.playing ? { number: keyNumber, time } : null;
  send("act", { action, key: keyNumber });
  for (const button of $("pad").children) button.setAttribute("aria-pressed", held.has(button.what));
}

const releaseAll = () => [...held].forEach((what) => hold(what, false, performance.now()));

// What a key or a button holds: a direction, or an action that has none, by its number.
function showActions() {
  const { actions } = about;
  const words = DIRECTIONS.filter((word) => actions.some((name) => wordsOf(name).includes(word)));
  const others = actions.map((name, index) => [name, index]).filter(([name, index]) => index && !wordsOf(name).length);
  const whats = [...words.map((word) => [SIGNS[word], word]), ...others];
  $("pad").hidden = !whats.length;
  $("pad").replaceChildren(
    ...whats.map(([label, what]) => {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = label;
      button.what = what;
      button.setAttribute("aria-label", label === SIGNS[what] ? what : label);
      button.addEventListener("pointerdown", (event) => {
        button.setPointerCapture(event.pointerId);
        hold(what, true, event.timeStamp);
      });
      for (const end of ["pointerup", "pointercancel", "lostpointercapture"])
        button.addEventListener(end, (event) => hold(what, false, event.timeStamp));
      button.addEventListener("contextmenu", (event) => event.preventDefault());
      return button;
    }),
  );
  const keys = Object.entries(KEYS).filter(([, word]) => words.includes(word));
  const told = words.map((word) => {
    const names = keys.filter(([, other]) => other === word).map(([code]) => code.replace(/^(Key|Arrow)/, ""));
    return `<span>${names.map((name) => `<kbd>${SIGNS[name.toLowerCase()] ?? name}</kbd>`).join(" ")} ${word}</span>`;
  });
  $("action-keys").innerHTML = told.join(" ");
}

// -- keys and buttons ------------------------------------------------------------------------------------------------

function seek(frame) {
  if (!picture) return;
  send("seek", { frame: Math.min(Math.max(frame, picture.first), picture.last) });
}

const commands = {
  play: () => send("play", { on: !state.playing }),
  step: () => send("step"),
  back: () => seek(stats.frame - 1),
  teleport: () => send("teleport"),
  follow: () => send("follow"),
  record: () => send("record", { on: !state.recording }),
  new: () => newGame(state.seed + 1),
};

function newGame(seed) {
  chart.clear();
  heat = { dream: null, real: null };
  stats.frame = -1;
  send("new", { seed });
}

const SHORTCUTS = { p: "play", ".": "step", ",": "back", t: "teleport", f: "follow", r: "record", n: "new" };

addEventListener("keydown", (event) => {
  const field = event.target.closest?.("input");
  if (event.key === "Escape") field?.blur();
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (field && (field.type !== "checkbox" || event.code === "Space")) return;
  const direction = KEYS[event.code];
  const number = Number(event.key) - 1;
  const plays = about?.actions.some((name) => wordsOf(name).includes(direction));
  if (plays || about?.actions[number] !== undefined) {
    if (!event.repeat) hold(plays ? direction : number, true, event.timeStamp);
    return event.preventDefault();
  }
  if (event.repeat && event.key !== ".") return;
  const pressed = event.target.closest?.("button, summary");
  const command = event.code === "Space" && !pressed ? "play" : SHORTCUTS[event.key.toLowerCase()];
  if (event.key.toLowerCase() === "h") $("heat").click();
  if (!command || $(command).hidden || $(command).disabled) return;
  commands[command]();
  event.preventDefault();
});

addEventListener("keyup", (event) => {
  for (const what of [KEYS[event.code], Number(event.key) - 1]) hold(what, false, event.timeStamp);
});
addEventListener("blur", releaseAll);

for (const [id, command] of Object.entries(commands)) $(id).addEventListener("click", command);
$("timeline").addEventListener("input", (event) => seek(Number(event.target.value)));
$("temperature").addEventListener("input", (event) => send("temperature", { value: Number(event.target.value) }));
$("pace").addEventListener("input", (event) => send("pace", { fps: Number(event.target.value) }));
$("seed").addEventListener("change", (event) => {
  if (event.target.reportValidity() && event.target.value) newGame(Number(event.target.value));
});
$("measure").addEventListener("change", (event) => send("surprise", { on: event.target.checked }));
$("heat").addEventListener("change", () => (painted = false));
$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  send("prompt", { text: $("prompt").value });
});
$("begin").addEventListener("click", () => {
  send("prompt", { text: $("prompt").value });
  newGame(state.seed + 1);
});
// After a slider was dragged the arrow keys play again.
for (const slider of document.querySelectorAll("input[type=range]"))
  slider.addEventListener("pointerup", () => slider.blur());

connect();
requestAnimationFrame(paint);
