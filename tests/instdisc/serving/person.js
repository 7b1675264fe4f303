// Put at the end of a copy of the page; what it saw goes into the title of the document that the browser prints.
const wait = async (what, of) => { for (let n = 0; n < 400; n++) { if (of()) return; await new Promise(r => setTimeout(r, 25)); } throw new Error("no " + what); };
const cards = () => [...document.querySelectorAll(".card")];
const idle = () => !document.body.classList.contains("busy");
const key = (name, target = document.activeElement) => target.dispatchEvent(new KeyboardEvent("keydown", { key: name, bubbles: true, cancelable: true }));
(async () => {
  const saw = {};
  try {
    await wait("cards", () => cards().length === 32);
    saw.name = document.querySelector("h1").textContent;
    // Drop an image.
    const image = await (await fetch("image?key=red/3.png")).blob();
    const carried = new DataTransfer();
    carried.items.add(new File([image], "mine.png", { type: "image/png" }));
    dispatchEvent(new DragEvent("dragenter", { dataTransfer: carried }));
    saw.invites = !document.getElementById("drop").hidden;
    dispatchEvent(new DragEvent("drop", { dataTransfer: carried, cancelable: true }));
    await wait("neighbors", () => document.querySelector(".asked") && idle());
    saw.dropped = [cards().length, cards()[0].dataset.key, cards()[0].querySelector(".value").textContent];
    // Click through.
    cards()[1].click();
    await wait("the next", () => location.hash.startsWith("#near=") && document.querySelector(".asked h2").textContent !== "mine.png" && idle());
    saw.clicked = decodeURIComponent(location.hash.slice(6)) === document.querySelector(".asked h2").textContent;
    saw.left_out = !cards().some(each => each.dataset.key === document.querySelector(".asked h2").textContent);
    history.back();
    await wait("the dropped one again", () => document.querySelector(".asked h2").textContent === "mine.png" && idle());
    history.back();
    await wait("all", () => cards().length === 32 && idle());
    // Filter by text.
    const text = document.getElementById("text");
    key("/", document.body); saw.slash = document.activeElement === text;
    text.value = "GREEN"; text.dispatchEvent(new Event("input", { bubbles: true }));
    await wait("the filtered", () => cards().length === 10 && cards().every(each => each.dataset.key.startsWith("green/")));
    // By keyboard: to the second one, select it, the next one too, open one.
    cards()[0].focus(); key("ArrowRight"); saw.arrow = document.activeElement === cards()[1];
    key(" "); key("ArrowRight"); key(" ");
    saw.count = document.getElementById("count").textContent;
    const opened = cards()[2].dataset.key;
    key("o");
    await wait("the whole image", () => document.getElementById("whole").naturalWidth === 32 && document.getElementById("large").open);
    saw.opened = document.getElementById("whole").alt === opened;
    document.getElementById("close").click();
    // Download the list.
    let blob, name;
    const create = URL.createObjectURL;
    URL.createObjectURL = each => { blob = each; return create.call(URL, each); };
    HTMLAnchorElement.prototype.click = function () { name = this.download; };
    document.getElementById("download").click();
    saw.list = [name, await blob.text()];
    // Galleries.
    document.querySelector("[data-view=duplicates]").click();
    await wait("duplicates", () => document.querySelector("h2")?.textContent === "Near duplicates" && idle());
    saw.duplicates = cards().map(each => each.dataset.key);
    document.querySelector("[data-view=clusters]").click();
    await wait("why there are none", () => document.querySelector(".empty") && idle());
    saw.missing = document.querySelector(".empty").textContent;
    // The map: an image under the pointer, zoom, and what is near the one in the middle.
    document.querySelector("[data-view=map]").click();
    await wait("the map", () => document.querySelector("canvas")?.dataset.scale && idle());
    const canvas = document.querySelector("canvas"), box = canvas.getBoundingClientRect();
    const pointer = (kind, more = {}) => canvas.dispatchEvent(new PointerEvent(kind, { clientX: box.left + box.width / 2, clientY: box.top + box.height / 2, bubbles: true, ...more }));
    pointer("pointermove");
    saw.under = document.querySelector(".tip").hidden ? null : document.querySelector(".tip").dataset.key;
    const scale = Number(canvas.dataset.scale);
    canvas.dispatchEvent(new WheelEvent("wheel", { deltaY: -500, clientX: box.left + box.width / 2, clientY: box.top + box.height / 2, cancelable: true }));
    await wait("the zoom", () => Number(canvas.dataset.scale) > scale * 2);
    key("ArrowLeft", canvas); key("ArrowRight", canvas); key("Enter", canvas);
    await wait("what is near it", () => document.querySelector(".asked h2") && idle());
    saw.near = document.querySelector(".asked h2").textContent;
    // What is no image.
    const wrong = new DataTransfer();
    wrong.items.add(new File(["no image"], "mine.txt", { type: "text/plain" }));
    dispatchEvent(new DragEvent("drop", { dataTransfer: wrong, cancelable: true }));
    await wait("the refusal", () => !document.getElementById("said").hidden);
    saw.refused = document.getElementById("said").textContent;
    await wait("pictures", () => [...document.images].filter(each => each.loading !== "lazy" && each.src).every(each => each.complete));
    saw.elsewhere = performance.getEntriesByType("resource").map(each => each.name).filter(each => !each.startsWith(location.origin) && !each.startsWith("data:") && !each.startsWith("blob:"));
    saw.wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
  } catch (error) { saw.error = String(error); }
  document.title = JSON.stringify(saw);
})();
