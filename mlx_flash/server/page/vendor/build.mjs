// Builds the libraries of the page again, byte for byte: node mlx_flash/server/page/vendor/build.mjs
// It needs Node.js 20, npm and its registry. package-lock.json fixes every version and its checksum.

import { spawnSync } from "node:child_process";
import { createHash } from "node:crypto";
import { cpSync, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { createRequire } from "node:module";
import { tmpdir } from "node:os";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";

const LANGUAGES = [
  ..."bash c cpp csharp css diff dockerfile go ini java javascript json kotlin lua makefile markdown".split(" "),
  ..."objectivec php python r ruby rust shell sql swift typescript xml yaml".split(" "),
];
const SOURCES = {
  "markdown-it": 'export { default as MarkdownIt } from "markdown-it";',
  temml: 'export { default as temml } from "temml";',
  highlight: [
    'import highlighter from "highlight.js/lib/core";',
    ...LANGUAGES.map((name) => `import ${name} from "highlight.js/lib/languages/${name}";`),
    `for (const [name, language] of Object.entries({ ${LANGUAGES.join(", ")} })) {`,
    "  highlighter.registerLanguage(name, language);",
    "}",
    "export { highlighter };",
  ].join("\n"),
};

const here = dirname(fileURLToPath(import.meta.url));
const work = mkdtempSync(join(tmpdir(), "mlx-flash-page-"));
try {
  for (const name of ["package.json", "package-lock.json"]) cpSync(join(here, name), join(work, name));
  const installed = spawnSync("npm", ["ci", "--ignore-scripts", "--no-audit", "--no-fund"], { cwd: work, stdio: "inherit" });
  if (installed.status !== 0) throw new Error("npm ci failed");
  const { build, transform } = createRequire(join(work, "package.json"))("esbuild");
  const packages = new Set();
  for (const [name, source] of Object.entries(SOURCES)) {
    const { metafile } = await build({
      stdin: { contents: source, resolveDir: work, sourcefile: `${name}.js` },
      absWorkingDir: work,
      outfile: join(here, `${name}.js`),
      bundle: true,
      charset: "utf8",
      format: "esm",
      legalComments: "none", // LICENSES.txt has them whole.
      metafile: true,
      minify: true,
      target: "es2022",
    });
    for (const path of Object.keys(metafile.inputs)) {
      const found = /^node_modules\/((?:@[^/]+\/)?[^/]+)\//.exec(path);
      if (found) packages.add(found[1]);
    }
  }
  // The styles of formulas, without the font: MathML has the fonts of the system.
  const styles = readFileSync(join(work, "node_modules/temml/dist/Temml-Local.css"), "utf8");
  const { code } = await transform(styles.replace(/@font-face \{[^}]*\}/, ""), { loader: "css", minify: true });
  writeFileSync(join(here, "temml.css"), code);
  writeFileSync(join(here, "LICENSES.txt"), [...packages].sort().map(licence).join("\n"));
} finally {
  rmSync(work, { recursive: true });
}
const kept = readdirSync(here).filter((name) => name !== "SHA256SUMS").sort();
const sum = (name) => createHash("sha256").update(readFileSync(join(here, name))).digest("hex");
writeFileSync(join(here, "SHA256SUMS"), kept.map((name) => `${sum(name)}  ${name}\n`).join(""));

/** A package's section of LICENSES.txt. */
function licence(name) {
  const folder = join(work, "node_modules", name);
  const { version, license } = JSON.parse(readFileSync(join(folder, "package.json"), "utf8"));
  const file = readdirSync(folder).find((entry) => /^licen[cs]e/i.test(entry));
  if (!file) throw new Error(`${name} has no licence file`);
  const text = readFileSync(join(folder, file), "utf8").replaceAll("\r\n", "\n").trim();
  return `${"=".repeat(78)}\n${name} ${version} (${license})\n${"=".repeat(78)}\n\n${text}\n`;
}
