// llama.cpp's engine by node-llama-cpp, for scripts/engine_llama.py:
//
//     node scripts/engine_llama.mjs .engines/llama REQUEST.json ANSWER.json
import {readFileSync, writeFileSync} from "node:fs";
import {join, resolve} from "node:path";
import {pathToFileURL} from "node:url";

const [engine, request, answer] = process.argv.slice(2);
const home = join(resolve(engine), "node_modules", "node-llama-cpp");
const {getLlama} = await import(pathToFileURL(join(home, "dist", "index.js")));
const {model: modelPath, asked} = JSON.parse(readFileSync(request));

const llama = await getLlama({gpu: false, build: "never", logLevel: "error"});
const model = await llama.loadModel({modelPath});
const next = {generateNext: {probabilities: true, token: true, options: {temperature: 0}}};

async function ask({lora, prompt, new: count}) {
    // The cache in fp32: its default of fp16 would be the largest error of an fp32 model.
    // One thread: several wait for each other by spinning, minutes for these models on a busy machine.
    const settings = {contextSize: 128, threads: 1, ...(lora ? {lora} : {})};
    const cache = {experimentalKvCacheKeyType: "F32", experimentalKvCacheValueType: "F32", flashAttention: false};
    const context = await model.createContext({...settings, ...cache});
    try {
        const sequence = context.getSequence();
        const outputs = await sequence.controlledEvaluate(prompt.map((token) => [token, next]));
        const logprobs = prompt.slice(1).map((token, i) => Math.log(outputs[i].next.probabilities.get(token)));
        const tokens = [outputs[prompt.length - 1].next.token];
        while (tokens.length < count) {
            const [output] = await sequence.controlledEvaluate([[tokens.at(-1), next]]);
            tokens.push(output.next.token);
        }
        return {logprobs, tokens};
    } finally {
        await context.dispose();
    }
}

const rows = {};
for (const {name, ...question} of asked) {
    try {
        rows[name] = await ask(question);
    } catch (error) {
        rows[name] = {refused: String(error.message).split("\n")[0]};
    }
}
const {version} = JSON.parse(readFileSync(join(home, "package.json")));
const versions = {"node-llama-cpp": version, "llama.cpp": llama.llamaCppRelease.release};
writeFileSync(answer, JSON.stringify({versions, rows}));
await llama.dispose();
