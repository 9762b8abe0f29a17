// Serves the web client on loopback and does with it, in a real browser, what a scenario says: one request for each thing that a
// person would do. Arguments: where the packages are, the port, the browser's program, a directory for its profile, one for
// screenshots.

import { createReadStream } from "node:fs";
import { createServer } from "node:http";
import { createRequire } from "node:module";
import path from "node:path";
import { fileURLToPath } from "node:url";

const [packages, port, program, profile, shots] = process.argv.slice(2);
const require = createRequire(path.join(packages, "package.json"));
const { build } = require("esbuild");
const { chromium } = require("playwright-core");

const here = path.dirname(fileURLToPath(import.meta.url));
// How long anything may take that is waited for, in milliseconds.
const PATIENCE = 180_000;
// What keeps the browser from calling home.
const FLAGS = ["--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync"];
const TYPES = { ".css": "text/css", ".html": "text/html", ".js": "text/javascript", ".svg": "image/svg+xml",
    ".wasm": "application/wasm", ".woff": "font/woff", ".woff2": "font/woff2" };

// What the page wants beside its bundle, under the names that `client.js` tells it.
const sdk = path.join(packages, "node_modules/hydrogen-view-sdk");
const olm = path.join(packages, "node_modules/@matrix-org/olm");
const files = new Map([
    ["/", path.join(here, "index.html")],
    ["/sw.js", path.join(sdk, "lib-build/sw.js")],
    ["/assets/main.js", path.join(sdk, "asset-build/assets/main.js")],
    ["/assets/download-sandbox.html", path.join(sdk, "asset-build/assets/download-sandbox.html")],
    ...["olm.js", "olm_legacy.js", "olm.wasm"].map((name) => [`/assets/${name}`, path.join(olm, name)]),
]);

const built = await build({ entryPoints: [path.join(here, "client.js")], bundle: true, format: "esm", write: false,
    nodePaths: [path.join(packages, "node_modules")], outdir: path.join(packages, "bundle"), assetNames: "[name]",
    // Asked for by the cryptography where it runs without a browser.
    external: ["crypto", "fs", "path"], loader: { ".svg": "file", ".woff": "file", ".woff2": "file" } });
const bundle = new Map(built.outputFiles.map((file) => [`/${path.basename(file.path)}`, file.contents]));

const context = await chromium.launchPersistentContext(profile, { executablePath: program, headless: true, args: FLAGS,
    env: { ...process.env, HOME: profile }, timeout: PATIENCE, viewport: { width: 1200, height: 800 } });
context.setDefaultTimeout(PATIENCE);
const [page] = context.pages();
page.on("console", (line) => console.log(`${line.type()}: ${line.text()}`));
page.on("pageerror", (error) => console.log(`error of the page: ${error.stack ?? error}`));

// Told to stop, Playwright ends the browser; without it there is nothing left to do here.
context.on("close", () => process.exit());

const shot = (name) => page.screenshot({ path: path.join(shots, `${name}.png`) });

const ACTIONS = {
    open: () => page.goto(`http://127.0.0.1:${port}/`),
    fill: ({ at, text }) => page.fill(at, text),
    press: ({ at, text }) => page.press(at, text),
    click: ({ at }) => page.click(at),
    hover: ({ at }) => page.hover(at),
    wait: ({ at }) => page.waitForSelector(at),
    // Clicks on what asks for a file, and gives it one.
    async choose({ at, text }) {
        const [chooser] = await Promise.all([page.waitForEvent("filechooser"), page.click(at)]);
        await chooser.setFiles(text);
    },
    // Waits until a picture is there, and not only its frame.
    async picture({ at }) {
        const picture = await page.waitForSelector(at);
        await page.waitForFunction((element) => element.complete && element.naturalWidth > 1, picture);
    },
    shot: ({ text }) => shot(text),
};

async function act(request) {
    const parts = [];
    for await (const part of request) {
        parts.push(part);
    }
    const { action, ...rest } = JSON.parse(Buffer.concat(parts).toString());
    if (!Object.hasOwn(ACTIONS, action)) {
        throw new Error(`there is no action ${action}`);
    }
    await ACTIONS[action](rest);
}

async function answer(request, response) {
    const { pathname } = new URL(request.url, "http://127.0.0.1");
    const headers = { "content-type": TYPES[path.extname(pathname)] ?? "text/html" };
    if (request.method === "POST") {
        try {
            await act(request);
            response.writeHead(204).end();
        } catch (error) {
            await shot("failed").catch(() => {});
            response.writeHead(500).end(`${error.message ?? error}`);
        }
    } else if (bundle.has(pathname)) {
        response.writeHead(200, headers).end(bundle.get(pathname));
    } else if (files.has(pathname)) {
        response.writeHead(200, headers);
        createReadStream(files.get(pathname)).pipe(response);
    } else {
        response.writeHead(404).end();
    }
}

createServer(answer).listen(Number(port), "127.0.0.1");
