// One answer: asks the server, and writes what comes into a node of the chat.
//
//   node.content, node.reasoning   grow while it streams
//   node.finish                    "stop", "length", ... as the server says; "stopped" by the reader; "error"
//   node.error                     {message, status} with finish "error"
//   node.stats                     {ttft, thought} in ms; rate in tokens/s; prompt, cached, completion in tokens

import { ApiError, stream } from "./api.js";
import { path } from "./store.js";

/** Fills the node at index; calls changed() after each piece. Never throws. */
export async function answer(chat, index, { model, key, signal, changed }) {
  const node = chat.nodes[index];
  const clock = new Clock();
  try {
    for await (const chunk of stream(request(chat, node.parent, model), chat.id, key, signal)) {
      const [choice] = chunk.choices ?? [];
      const { content = "", reasoning_content: reasoning = "" } = choice?.delta ?? {};
      if (reasoning) node.reasoning = (node.reasoning ?? "") + reasoning;
      if (content) node.content += content;
      if (choice?.finish_reason) node.finish = choice.finish_reason;
      if (reasoning || content) clock.tick(Boolean(content));
      node.stats = clock.stats(chunk);
      changed();
    }
    node.finish ??= "stop";
  } catch (error) {
    // The browser's own words for a stop are no error to the reader.
    if (signal.aborted) node.finish = "stopped";
    else {
      const known = error instanceof ApiError;
      node.finish = "error";
      node.error = { message: known ? error.message : `The page failed: ${error.message}`, status: error.status ?? 0 };
    }
  }
}

/** The conversation up to index, as the API wants it. Thoughts are not sent back: templates drop them anyway. */
function request(chat, index, model) {
  const { system, think, sampling } = chat.settings;
  const messages = path(chat, index).map((i) => ({ role: chat.nodes[i].role, content: chat.nodes[i].content }));
  if (system) messages.unshift({ role: "system", content: system });
  // Qwen's name for it; a template that knows no such switch takes no notice
  const template = think && { chat_template_kwargs: { enable_thinking: think === "on" } };
  return { model: model || undefined, messages, ...sampling, ...template };
}

/** Times as the reader sees them, network and all; and the server's counts. */
class Clock {
  #start = performance.now();
  #first = 0;
  #last = 0;
  #content = 0; // when the thought ended

  tick(isContent) {
    this.#last = performance.now();
    this.#first ||= this.#last;
    if (isContent) this.#content ||= this.#last;
  }

  stats({ usage, timings }) {
    const span = this.#last - this.#first;
    const completion = usage?.completion_tokens;
    return {
      ttft: this.#first && this.#first - this.#start,
      thought: (this.#content || this.#last) - this.#first,
      // the server's own rate if it tells: a short answer comes in one piece, and has no other
      rate: timings?.predicted_per_second ?? (completion > 1 && span > 0 ? ((completion - 1) / span) * 1000 : 0),
      prompt: usage?.prompt_tokens,
      cached: usage?.prompt_tokens_details?.cached_tokens,
      completion,
    };
  }
}
