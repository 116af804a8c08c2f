// Draws /openapi.json as a page: routes by tag, with parameters, bodies, answers and every field of the schemas.

import { $, make } from "./dom.js";

const document_ = await (await fetch("/openapi.json")).json();
const schemas = document_.components.schemas;
const nameOf = (schema) => schema?.$ref?.split("/").pop();

function typeOf(schema = {}) {
  if (schema.$ref) return nameOf(schema);
  if (schema.anyOf) return schema.anyOf.map(typeOf).join(" or ");
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
  return parts.filter(Boolean).join(", ");
}

function fields(properties, required = []) {
  return make("ul", { class: "docs-fields" }, ...Object.entries(properties).map(([name, schema]) => make("li", {},
    make("code", { text: name }), ` ${typeOf(schema)}${required.includes(name) ? ", required" : ""}. `,
    [schema.description, limits(schema)].filter(Boolean).join(" "))));
}

function operation(path, method, item) {
  const box = make("details", { class: "docs-route" }, make("summary", {}, make("code", { text: `${method.toUpperCase()} ${path}` }), ` ${item.summary || ""}`));
  if (item.description) box.append(make("p", { class: "docs-text", text: item.description }));
  if (item.parameters?.length) box.append(make("h3", { text: "Parameters" }), fields(Object.fromEntries(item.parameters.map((p) => [`${p.name} (${p.in})`, { ...p.schema, description: p.description }]))));
  for (const [kind, content] of Object.entries(item.requestBody?.content || {})) {
    const schema = content.schema.$ref ? schemas[nameOf(content.schema)] : content.schema;
    box.append(make("h3", { text: `Body, ${kind}` }), schema.properties ? fields(schema.properties, schema.required) : make("p", { text: typeOf(schema) }));
  }
  box.append(make("h3", { text: "Answers" }), make("ul", { class: "docs-fields" }, ...Object.entries(item.responses).map(([status, answer]) => {
    const kinds = Object.values(answer.content || {}).map((c) => nameOf(c.schema)).filter(Boolean);
    return make("li", {}, make("code", { text: status }), ` ${kinds.join(", ")} ${answer.description}`);
  })));
  return box;
}

const byTag = new Map(document_.tags.map((tag) => [tag.name, { tag, routes: [] }]));
for (const [path, methods] of Object.entries(document_.paths)) {
  for (const [method, item] of Object.entries(methods)) byTag.get(item.tags?.[0])?.routes.push(operation(path, method, item));
}
const sections = [...byTag.values()].filter(({ routes }) => routes.length).map(({ tag, routes }) => make("section", { class: "gallery" }, make("h2", { text: tag.name }), make("p", { class: "help", text: tag.description }), ...routes));
const shapes = make("section", { class: "gallery" }, make("h2", { text: "Schemas" }), ...Object.entries(schemas).filter(([, s]) => s.properties).map(([name, s]) => make("details", { class: "docs-route" }, make("summary", {}, make("code", { text: name })), make("p", { class: "docs-text", text: s.description || "" }), fields(s.properties, s.required))));
$("docs").replaceChildren(make("p", { class: "docs-text", text: document_.info.description.trim() }), ...sections, shapes);
