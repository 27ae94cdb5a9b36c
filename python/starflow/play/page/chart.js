// The surprise of the last frames: a line for the dream, and one for the real world.

const SPAN = 300; // frames from the left edge to the right
const LEAST = 100; // bits that the axis reaches at least

export class Chart {
  // `seek` is called with the frame that somebody points at, `changed` when the canvas has another size or other colours.
  constructor(canvas, seek, changed) {
    this.canvas = canvas;
    this.bits = new Map(); // frame -> [dream, real]
    this.marks = new Set(); // frames at which the past was edited
    this.top = LEAST;
    this.current = 0;
    this.right = SPAN;
    canvas.addEventListener("pointerdown", (event) => {
      const share = event.offsetX / canvas.clientWidth;
      seek(Math.round(this.right - SPAN + share * SPAN));
    });
    new ResizeObserver(changed).observe(canvas);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", changed);
  }

  clear() {
    this.bits.clear();
    this.marks.clear();
  }

  add(frame, dream, real, edited) {
    this.bits.set(frame, [dream, real]);
    if (edited) this.marks.add(frame);
  }

  // Frames before `first` are forgotten, and those after `last` have another future.
  keep(first, last) {
    for (const held of [this.bits, this.marks])
      for (const frame of held.keys()) if (frame < first || frame > last) held.delete(frame);
  }

  // Shows the stretch that ends with the last frame, or one around a frame of the past.
  show(current, last) {
    this.current = current;
    this.right = Math.max(SPAN, current < last - SPAN ? current + SPAN / 2 : last);
  }

  draw() {
    const { canvas } = this;
    const scale = devicePixelRatio || 1;
    const width = canvas.clientWidth;
    const height = canvas.clientHeight;
    if (!width) return;
    if (canvas.width !== Math.round(width * scale) || canvas.height !== Math.round(height * scale)) {
      canvas.width = Math.round(width * scale);
      canvas.height = Math.round(height * scale);
    }
    const style = getComputedStyle(canvas);
    const colour = (name) => style.getPropertyValue(`--${name}`);
    const pen = canvas.getContext("2d");
    pen.setTransform(scale, 0, 0, scale, 0, 0);
    pen.clearRect(0, 0, width, height);

    const left = this.right - SPAN;
    const shown = [...this.bits].filter(([frame]) => frame >= left && frame <= this.right);
    const most = shown.reduce((top, [, values]) => Math.max(top, ...values.map((value) => value ?? 0)), LEAST);
    this.top += (most * 1.1 - this.top) * (most * 1.1 > this.top ? 1 : 0.25);
    const floor = -0.12 * this.top;
    const x = (frame) => ((frame - left) / SPAN) * width;
    const y = (bits) => height - 2 - ((Math.max(bits, floor) - floor) / (this.top - floor)) * (height - 12);

    pen.font = "11px system-ui, 'DejaVu Sans', sans-serif";
    pen.strokeStyle = colour("line");
    pen.lineWidth = 1;
    const unit = round(this.top / 3);
    for (let bits = 0; bits < this.top; bits += unit) {
      pen.beginPath();
      pen.moveTo(0, Math.round(y(bits)) + 0.5);
      pen.lineTo(width, Math.round(y(bits)) + 0.5);
      pen.stroke();
    }
    pen.setLineDash([3, 3]);
    pen.strokeStyle = colour("alarm");
    for (const frame of this.marks) line(pen, x(frame), 0, height);
    pen.setLineDash([]);
    pen.strokeStyle = colour("soft");
    line(pen, x(this.current), 0, height);

    const frames = shown.sort(([a], [b]) => a - b);
    ["real", "dream"].forEach((name) => {
      const place = name === "dream" ? 0 : 1;
      const points = frames.filter(([, values]) => values[place] !== null);
      if (!points.length) return;
      pen.strokeStyle = colour(name);
      // Twice, since lines of one pixel are drawn at once, but those of more take 20 times as long without a GPU.
      pen.lineWidth = 1;
      for (const lower of [0, 0.7]) {
        pen.beginPath();
        points.forEach(([frame, values], at) => {
          // A gap where surprise was not measured.
          const gap = at === 0 || frame - points[at - 1][0] > 1;
          pen[gap ? "moveTo" : "lineTo"](x(frame), y(values[place]) + lower);
        });
        pen.stroke();
      }
    });

    // Numbers last, with the ground around them, so that a line does not hide them.
    pen.fillStyle = colour("soft");
    pen.strokeStyle = colour("card");
    pen.lineWidth = 4;
    for (let bits = 0; bits < this.top; bits += unit) {
      pen.strokeText(`${bits} bits`, 2, y(bits) - 4);
      pen.fillText(`${bits} bits`, 2, y(bits) - 4);
    }
  }
}

// 1, 2 or 5 times a power of ten, no less than a number.
function round(number) {
  const power = 10 ** Math.floor(Math.log10(number));
  return [1, 2, 5, 10].map((times) => times * power).find((value) => value >= number);
}

function line(pen, x, top, bottom) {
  pen.beginPath();
  pen.moveTo(Math.round(x) + 0.5, top);
  pen.lineTo(Math.round(x) + 0.5, bottom);
  pen.stroke();
}
