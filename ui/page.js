// What the browser does by itself: it turns clicks into Gradio events, copies, selects, uploads, scrolls.
// Each gr.HTML runs this whole file when it is mounted and then calls the one function that is for it;
// `element` stays the same while Gradio patches what is inside, so listeners sit on it and look at `data-action`.

function onAction(element, actions) {
  element.addEventListener("click", (event) => {
    const target = event.target.closest("[data-action]");
    if (target && actions[target.dataset.action]) actions[target.dataset.action](target);
  });
}

async function copyText(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  // over plain http from another machine there is no clipboard API
  const area = document.createElement("textarea");
  area.value = text;
  document.body.append(area);
  area.select();
  document.execCommand("copy");
  area.remove();
}

// An answer as it is pasted: its text, then a line per source.
function plainAnswer(turn) {
  const body = turn.querySelector(".answer").cloneNode(true);
  body.querySelectorAll("button.cite").forEach((mark) => mark.replaceWith(`[${mark.textContent}]`));
  body.querySelectorAll(".note").forEach((note) => note.remove());
  document.body.append(body); // innerText knows line breaks only for what is laid out
  const text = body.innerText.trim();
  body.remove();
  const sources = [...turn.querySelectorAll(".citations .source")].map(
    (source) => `[${source.dataset.n}] ${source.title} ${source.querySelector(".page")?.textContent ?? ""}`.trim(),
  );
  return sources.length ? `${text}\n\n${sources.join("\n")}` : text;
}

// A view that follows its growing content unless the reader has scrolled up.
function followBottom(view) {
  let follows = true;
  view.addEventListener("scroll", () => {
    follows = view.scrollHeight - view.scrollTop - view.clientHeight < 80;
  });
  new MutationObserver(() => {
    if (follows) view.scrollTop = view.scrollHeight;
  }).observe(view, { childList: true, subtree: true, characterData: true });
}

// The document's own title and language follow the page's.
function header(element) {
  const tell = () => {
    const { title, lang } = element.querySelector(".brand").dataset;
    document.title = title;
    document.documentElement.lang = lang;
  };
  tell();
  new MutationObserver(tell).observe(element, { attributes: true, subtree: true });
}

function conversation(element, trigger) {
  onAction(element, {
    cite: (button) => trigger("cite", { turn: Number(button.dataset.turn), n: Number(button.dataset.n) }),
    example: (button) => trigger("example", { question: button.dataset.question }),
    upload: () => document.querySelector("#tabs [role=tab]:nth-of-type(2)").click(),
    copy: async (button) => {
      await copyText(plainAnswer(button.closest(".turn")));
      const label = button.textContent;
      button.textContent = button.dataset.copied;
      setTimeout(() => (button.textContent = label), 1500);
    },
  });
  const view = element.closest("#conversation");
  view.setAttribute("role", "log"); // screen readers announce what is added
  followBottom(view);
  document.addEventListener("click", (event) => {
    if (event.target.closest("#send, #stop, #clear")) document.querySelector("#question textarea").focus();
  });
}

function passage(element, trigger) {
  onAction(element, { close: () => trigger("close") });
  new MutationObserver(() => {
    const mark = element.querySelector("mark");
    if (!mark) return;
    // the quote in the middle of its own box; the panel itself into view where it stands below the conversation
    const text = element.querySelector(".text");
    text.scrollTop = mark.offsetTop - text.offsetTop - text.clientHeight / 3;
    element.scrollIntoView({ behavior: "smooth", block: "nearest" });
  }).observe(element, { childList: true, subtree: true, characterData: true });
}

function dropzone(element, trigger, upload) {
  const send = async (files) => {
    const zone = element.querySelector(".drop");
    if (!files.length || zone.getAttribute("aria-busy")) return;
    zone.setAttribute("aria-busy", "true");
    const report = element.querySelector(".report");
    const arrived = [];
    const refused = [];
    for (const [done, file] of files.entries()) {
      const values = { done: done + 1, total: files.length, name: file.name };
      report.textContent = zone.dataset.uploading.replace(/{(\w+)}/g, (_, key) => values[key]);
      try {
        arrived.push((await upload(file)).path);
      } catch (error) {
        console.warn(file.name, error);
        refused.push(file.name);
      }
    }
    report.textContent = "";
    zone.removeAttribute("aria-busy");
    trigger("files", { arrived, refused });
  };
  element.addEventListener("change", (event) => {
    send([...event.target.files]);
    event.target.value = "";
  });
  onAction(element, { halt: () => trigger("halt") });
  const hover = (on) => (event) => {
    event.preventDefault();
    element.querySelector(".drop").classList.toggle("over", on);
  };
  element.addEventListener("dragover", hover(true));
  element.addEventListener("dragleave", hover(false));
  element.addEventListener("drop", (event) => {
    hover(false)(event);
    send([...event.dataTransfer.files]);
  });
}

function embedder(element, trigger) {
  onAction(element, {
    reembed: () => trigger("change_over"),
    "roll-back": () => trigger("go_back"),
    halt: () => trigger("halt"),
  });
}

function sources(element, trigger) {
  const boxes = () => [...element.querySelectorAll("[data-source]")];
  const selected = () => boxes().filter((box) => box.checked).map((box) => box.dataset.source);
  const button = () => element.querySelector("[data-action=remove]");
  const settle = () => {
    const asked = button();
    if (!asked) return;
    if (asked.dataset.label) asked.textContent = asked.dataset.label;
    delete asked.dataset.label;
    asked.disabled = selected().length === 0;
    element.querySelector("[data-action=cancel]").hidden = true;
  };
  const reset = () => {
    boxes().forEach((box) => (box.checked = false));
    const all = element.querySelector("[data-action=all]");
    if (all) all.checked = false;
    settle();
  };
  // Gradio patches rows in place, so a tick would pass to whichever document comes to stand in its row
  new MutationObserver((changes) => {
    if (changes.some((change) => change.type === "attributes" || change.target.tagName === "TBODY")) reset();
  }).observe(element, { subtree: true, childList: true, attributeFilter: ["data-source"] });
  element.addEventListener("change", (event) => {
    if (event.target.dataset.action === "all") boxes().forEach((box) => (box.checked = event.target.checked));
    settle();
  });
  onAction(element, {
    cancel: reset,
    remove: (asked) => {
      if (asked.dataset.label) {
        const names = selected();
        reset();
        trigger("remove", { sources: names });
        return;
      }
      asked.dataset.label = asked.textContent;
      asked.textContent = asked.dataset.confirm.replace("{count}", selected().length);
      element.querySelector("[data-action=cancel]").hidden = false;
    },
  });
}
