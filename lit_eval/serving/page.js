"use strict";
const get = (id) => document.getElementById(id);
let running = null;

function say(text, isError = false) {
  get("state").textContent = text;
  get("state").classList.toggle("error", isError);
}

function headers() {
  const key = get("key").value;
  return { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
}

async function failure(response) {
  if (response.status === 401) get("key_field").hidden = false;
  const body = await response.json().catch(() => null);
  return body?.error?.message ?? `status ${response.status}`;
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    text += value;
    const parts = text.split("\n\n");
    text = parts.pop();
    for (const part of parts) if (part !== "data: [DONE]") yield JSON.parse(part.slice("data: ".length));
  }
}

function settings() {
  const body = { prompt: get("prompt").value, stream: true };
  for (const name of ["max_tokens", "temperature", "top_p", "seed"]) {
    if (get(name).value !== "") body[name] = Number(get(name).value);
  }
  return body;
}

function busy(on) {
  get("go").disabled = on;
  get("stop").disabled = !on;
  get("output").setAttribute("aria-busy", String(on));
}

async function run() {
  if (running || !get("form").reportValidity()) return;
  running = new AbortController();
  busy(true);
  say("Waiting for the model.");
  const [prompt, written] = ["prompt", "new"].map((name) => {
    const part = document.createElement("span");
    part.className = name;
    return part;
  });
  prompt.textContent = get("prompt").value;
  get("output").replaceChildren(prompt, written);
  const began = performance.now();
  try {
    const call = { method: "POST", headers: headers(), body: JSON.stringify(settings()), signal: running.signal };
    const response = await fetch("v1/completions", call);
    if (!response.ok) throw new Error(await failure(response));
    let finish = null;
    for await (const chunk of events(response)) {
      if (chunk.error) throw new Error(chunk.error.message);
      written.textContent += chunk.choices[0].text;
      finish = chunk.choices[0].finish_reason ?? finish;
      say("Generating.");
    }
    const seconds = ((performance.now() - began) / 1000).toFixed(1);
    say(finish === "stop" ? `The model ended the text after ${seconds} s.` : `Done in ${seconds} s.`);
  } catch (error) {
    if (error.name === "AbortError") say("Stopped.");
    else say(`Error: ${error.message}`, true);
  } finally {
    running = null;
    busy(false);
  }
}

get("form").addEventListener("submit", (event) => {
  event.preventDefault();
  run();
});
get("stop").addEventListener("click", () => running?.abort());
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) run();
});

async function showModel() {
  const response = await fetch("v1/models", { headers: headers() });
  if (response.status === 401) get("key_field").hidden = false;
  if (!running) {
    const missing = get("key").value ? "The API key is wrong." : "This server requires an API key.";
    say(response.status === 401 ? missing : "Ready.");
  }
  if (response.ok) {
    const name = (await response.json()).data[0].id;
    get("model").textContent = name;
    document.title = `Try ${name}`;
  }
}

get("key").addEventListener("change", showModel);
showModel();
