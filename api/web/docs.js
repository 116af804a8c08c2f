// Draws /openapi.json as a page: routes by tag, with parameters, bodies, examples, answers and every field.

import { $, make } from "./dom.js";

const document_ = await (await fetch("/openapi.json")).json();
const schemas = document_.components.schemas;
const nameOf = (schema) => schema?.$ref?.split("/").pop();

// The little of Markdown that descriptions use: paragraphs, numbered lists, `code` and **bold**. Only ever text.
function inline(text) {
  return text.split(/(`[^`]+`|\*\*[^*]+\*\*)/).map((part) => {
    if (part.startsWith("`")) return make("code", { text: part.slice(1, -1) });
    return part.startsWith("**") ? make("b", { text: part.slice(2, -2) }) : part;
  });
}

function prose(text) {
  return (text || "").trim().split(/\n\s*\n/).map((block) => {
    const items = block.split(/\n(?=\d+\. )/).map((item) => item.replace(/\s*\n\s*/g, " "));
    if (!/^\d+\. /.test(items[0])) return make("p", { class: "docs-text" }, ...inline(items.join(" ")));
    return make("ol", { class: "docs-text" }, ...items.map((item) => make("li", {}, ...inline(item.replace(/^\d+\. /, "")))));
  });
}

function typeOf(schema = {}) {
  if (schema.$ref) return nameOf(schema);
  if (schema.anyOf) return schema.anyOf.map(typeOf).filter((type, index, all) => all.indexOf(type) === index).join(" or ");
  if (schema.enum) return schema.enum.map((value) => JSON.stringify(value)).join(", ");
  if (schema.const !== undefined) return JSON.stringify(schema.const);
  if (schema.type === "array") return `list of ${typeOf(schema.items) || "values"}`;
  return schema.format === "binary" ? "file" : schema.type || "any";
}

function limits(schema = {}) {
  const parts = (schema.anyOf || [schema]).flatMap((s) => [
    s.minimum !== undefined && `from ${s.minimum}`, s.exclusiveMinimum !== undefined && `above ${s.exclusiveMinimum}`,
    s.maximum !== undefined && `to ${s.maximum}`, s.minLength !== undefined && `${s.minLength} characters or more`,
    s.maxLength !== undefined && `at most ${s.maxLength} characters`,
  ]);
  const text = parts.filter(Boolean).join(", ");
  return text.charAt(0).toUpperCase() + text.slice(1);
}

const example = (schema) => schema?.examples?.find((value) => value !== null);

function fields(properties, required = []) {
  return make("dl", { class: "docs-fields" }, ...Object.entries(properties).flatMap(([name, schema]) => {
    const rest = [schema.description, limits(schema) && `${limits(schema)}.`].filter(Boolean).join(" ");
    const shown = example(schema);
    return [
      make("dt", {}, make("code", { text: name }), make("span", { class: "docs-type", text: `${typeOf(schema)}${required.includes(name) ? ", required" : ""}` })),
      make("dd", {}, ...inline(rest), ...(shown === undefined ? [] : [` For example `, make("code", { text: JSON.stringify(shown) }), "."])),
    ];
  }));
}

function body(kind, schema) {
  const whole = schema.$ref ? schemas[nameOf(schema)] : schema;
  const parts = [make("h3", {}, "Body ", make("code", { text: kind }))];
  if (example(whole)) parts.push(make("pre", { tabIndex: 0, text: JSON.stringify(example(whole), null, 2) }));
  parts.push(whole.properties ? fields(whole.properties, whole.required) : make("p", { text: typeOf(schema) }));
  return parts;
}

function answers(responses) {
  return make("dl", { class: "docs-fields" }, ...Object.entries(responses).flatMap(([status, answer]) => {
    const kinds = Object.values(answer.content || {}).map((content) => nameOf(content.schema)).filter(Boolean);
    return [
      make("dt", {}, make("code", { text: status }), make("span", { class: "docs-type", text: kinds.join(", ") })),
      make("dd", {}, ...answer.description.split("; or: ").map((one) => make("p", {}, ...inline(one)))),
    ];
  }));
}

function operation(path, method, item) {
  const box = make("details", { class: "docs-route", id: `${method}${path}` }, make("summary", {}, make("span", { class: `verb ${method}`, text: method.toUpperCase() }), make("code", { text: path }), make("span", { class: "digest", text: item.summary || "" })));
  box.append(...prose(item.description));
  if (item.parameters?.length) box.append(make("h3", { text: "Parameters" }), fields(Object.fromEntries(item.parameters.map((p) => [`${p.name} (${p.in})`, { ...p.schema, description: p.description }]))));
  for (const [kind, content] of Object.entries(item.requestBody?.content || {})) box.append(...body(kind, content.schema));
  box.append(make("h3", { text: "Answers" }), answers(item.responses));
  return box;
}

const byTag = new Map(document_.tags.map((tag) => [tag.name, { tag, routes: [] }]));
for (const [path, methods] of Object.entries(document_.paths)) {
  for (const [method, item] of Object.entries(methods)) byTag.get(item.tags?.[0])?.routes.push(operation(path, method, item));
}
const sections = [...byTag.values()].filter(({ routes }) => routes.length).map(({ tag, routes }) => make("section", { class: "gallery" }, make("h2", { text: tag.name }), make("p", { class: "help", text: tag.description }), ...routes));
const shapes = make("section", { class: "gallery" }, make("h2", { text: "Schemas" }), ...Object.entries(schemas).filter(([, s]) => s.properties).map(([name, s]) => make("details", { class: "docs-route" }, make("summary", {}, make("code", { text: name })), ...prose(s.description), fields(s.properties, s.required))));
$("docs").replaceChildren(...prose(document_.info.description), ...sections, shapes);
