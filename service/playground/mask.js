/* A brush on a picture: paints what may change. */

export class MaskPainter {
  /** `canvas` lies over the picture, and `brush` is the range input of the brush's width, in hundredths of it. */
  constructor(canvas, brush) {
    this.canvas = canvas;
    this.brush = brush;
    this.context = canvas.getContext("2d");
    this.isPainted = false;
    canvas.addEventListener("pointerdown", (event) => this.begin(event));
    canvas.addEventListener("pointermove", (event) => this.draw(event));
  }

  /** Starts anew on a picture of this size. */
  reset(width, height) {
    Object.assign(this.canvas, { width, height });
    this.isPainted = false;
  }

  clear() {
    this.reset(this.canvas.width, this.canvas.height);
  }

  place(event) {
    const box = this.canvas.getBoundingClientRect();
    const { width, height } = this.canvas;
    return [((event.clientX - box.left) / box.width) * width, ((event.clientY - box.top) / box.height) * height];
  }

  begin(event) {
    this.canvas.setPointerCapture(event.pointerId);
    this.last = this.place(event);
    this.draw(event);
  }

  draw(event) {
    if (!this.canvas.hasPointerCapture(event.pointerId)) return;
    const { context, canvas } = this;
    context.strokeStyle = getComputedStyle(canvas).color;
    context.lineWidth = (Math.max(canvas.width, canvas.height) * this.brush.value) / 100;
    context.lineCap = context.lineJoin = "round";
    context.beginPath();
    context.moveTo(...this.last);
    this.last = this.place(event);
    context.lineTo(...this.last);
    context.stroke();
    this.isPainted = true;
  }

  /** The mask as the API takes it, a PNG that is transparent where it was painted; undefined if nothing was. */
  toDataURL() {
    if (!this.isPainted) return undefined;
    const mask = document.createElement("canvas");
    Object.assign(mask, { width: this.canvas.width, height: this.canvas.height });
    const context = mask.getContext("2d");
    context.fillRect(0, 0, mask.width, mask.height);
    context.globalCompositeOperation = "destination-out";
    context.drawImage(this.canvas, 0, 0);
    return mask.toDataURL("image/png");
  }
}
